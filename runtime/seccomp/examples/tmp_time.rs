#![allow(missing_docs, unsafe_code, clippy::all)]
use slipway_seccomp::*;
use oci_spec::runtime::*;
fn t(f: &Filter) -> Vec<u64> {
    let mut v: Vec<u64> = (0..200).map(|_| unsafe {
        let mut p=[0i32;2]; libc::pipe(p.as_mut_ptr());
        let pid = libc::fork();
        if pid == 0 { let s = std::time::Instant::now(); load(f).unwrap(); let n = s.elapsed().as_nanos() as u64; libc::write(p[1], &n as *const _ as _, 8); libc::_exit(0) }
        let mut n=0u64; libc::read(p[0], &mut n as *mut _ as _, 8); libc::waitpid(pid, std::ptr::null_mut(), 0); libc::close(p[0]); libc::close(p[1]); n
    }).collect();
    v.sort(); v
}
fn main() {
    let p = default_profile(&Capabilities::new(), Arch::ScmpArchX86_64, (6,1));
    let o = CompileOptions::default();
    for (n, a) in [("x64", vec![Arch::ScmpArchX86_64]), ("x64+x32", vec![Arch::ScmpArchX86_64, Arch::ScmpArchX32]), ("x64+x86", vec![Arch::ScmpArchX86_64, Arch::ScmpArchX86]), ("all", vec![Arch::ScmpArchX86_64, Arch::ScmpArchX86, Arch::ScmpArchX32])] {
        let mut p = p.clone(); p.set_architectures(Some(a));
        let f = compile(&p, &o).unwrap();
        let v = t(&f);
        println!("{n}: {} instr, p10 {} median {} ns", f.instructions.len(), v[20], v[100]);
    }
    let e = compile(&LinuxSeccomp::default(), &o).unwrap();
    let v = t(&e);
    println!("empty: {} instr, p10 {} median {} ns", e.instructions.len(), v[20], v[100]);
    for n in 0..3 { let s = std::time::Instant::now(); let f = compile(&p, &o).unwrap(); println!("{n} {:?} {}", s.elapsed(), f.instructions.len()); }
    let f = compile(&p, &o).unwrap();
    if std::env::args().len() > 1 { for (i, x) in f.instructions.iter().enumerate() { println!("{i:3} {:02x} {:3} {:3} {:#x}", x.code, x.jt, x.jf, x.k); } }
}
