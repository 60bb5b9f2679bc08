//! Localhost profiles in both formats, and the cache.
#![allow(clippy::expect_used, reason = "a test fails by panicking")]

use oci_spec::runtime::{
    Arch, Capabilities, Capability, LinuxSeccomp, LinuxSeccompAction as Action,
};
use slipway_seccomp::{ProfileCache, Source, Subject, default_profile, parse_profile};
use std::{error::Error, sync::Arc};

const X86_64: Arch = Arch::ScmpArchX86_64;

fn parse_for(
    json: &str,
    caps: &[Capability],
    arch: Arch,
    kernel: (u32, u32),
) -> Result<LinuxSeccomp, slipway_seccomp::SeccompError> {
    let capabilities: Capabilities = caps.iter().copied().collect();
    parse_profile(
        json.as_bytes(),
        Subject {
            capabilities: &capabilities,
            arch,
            kernel,
        },
    )
}

fn parse(json: &str) -> Result<LinuxSeccomp, slipway_seccomp::SeccompError> {
    parse_for(json, &[], X86_64, (6, 1))
}

/// The error's text with those of its causes.
fn complaint(json: &str) -> String {
    let error = parse(json).expect_err("must be refused");
    let mut text = error.to_string();
    let mut cause: Option<&dyn Error> = error.source();
    while let Some(c) = cause {
        text = format!("{text}: {c}");
        cause = c.source();
    }
    text
}

/// The names that a profile keeps for a subject.
fn names(json: &str, caps: &[Capability], arch: Arch, kernel: (u32, u32)) -> Vec<String> {
    let profile = parse_for(json, caps, arch, kernel).expect("a profile");
    profile
        .syscalls()
        .iter()
        .flatten()
        .flat_map(|e| e.names().clone())
        .collect()
}

#[test]
fn an_oci_profile_comes_out_as_it_went_in() {
    let capabilities = Capabilities::from([Capability::SysAdmin]);
    for caps in [&capabilities, &Capabilities::new()] {
        let profile = default_profile(caps, X86_64, (6, 1));
        let json = serde_json::to_string(&profile).expect("JSON");
        assert_eq!(parse(&json).expect("a profile"), profile);
    }
    let full = parse(
        r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":38,"architectures":["SCMP_ARCH_X86"],
            "flags":["SECCOMP_FILTER_FLAG_LOG"],"listenerPath":"/run/agent","listenerMetadata":"m",
            "syscalls":[{"names":["a","b"],"action":"SCMP_ACT_ERRNO","errnoRet":5,
                         "args":[{"index":1,"value":2,"valueTwo":3,"op":"SCMP_CMP_MASKED_EQ"}]}]}"#,
    )
    .expect("a profile");
    assert_eq!(full.default_errno_ret(), Some(38));
    assert_eq!(
        full.architectures().as_deref(),
        Some([Arch::ScmpArchX86].as_slice())
    );
    assert_eq!(full.flags().as_ref().map(Vec::len), Some(1));
    assert_eq!(full.listener_metadata().as_deref(), Some("m"));
    let call = &full.syscalls().as_ref().expect("calls")[0];
    assert_eq!(
        (call.action(), call.errno_ret()),
        (Action::ScmpActErrno, Some(5))
    );
    let arg = &call.args().as_ref().expect("arguments")[0];
    assert_eq!((arg.index(), arg.value(), arg.value_two()), (1, 2, Some(3)));
}

#[test]
fn arch_map_gives_this_machines_abis() {
    let json = r#"{"defaultAction":"SCMP_ACT_ERRNO","archMap":[
        {"architecture":"SCMP_ARCH_X86_64","subArchitectures":["SCMP_ARCH_X86","SCMP_ARCH_X32"]},
        {"architecture":"SCMP_ARCH_AARCH64","subArchitectures":["SCMP_ARCH_ARM"]},
        {"architecture":"SCMP_ARCH_RISCV64","subArchitectures":null}],"syscalls":null}"#;
    let abis = |arch| {
        parse_for(json, &[], arch, (6, 1))
            .expect("a profile")
            .architectures()
            .clone()
    };
    assert_eq!(
        abis(X86_64),
        Some(vec![X86_64, Arch::ScmpArchX86, Arch::ScmpArchX32])
    );
    assert_eq!(
        abis(Arch::ScmpArchAarch64),
        Some(vec![Arch::ScmpArchAarch64, Arch::ScmpArchArm])
    );
    assert_eq!(
        abis(Arch::ScmpArchRiscv64),
        Some(vec![Arch::ScmpArchRiscv64])
    );
    assert_eq!(abis(Arch::ScmpArchS390x), None);
}

#[test]
fn includes_and_excludes_decide() {
    let json = r#"{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[
        {"name":"always","action":"SCMP_ACT_ALLOW","comment":"old form","includes":{},"excludes":{}},
        {"names":["both"],"action":"SCMP_ACT_ALLOW","includes":{"caps":["CAP_SYS_ADMIN","CAP_BPF"]}},
        {"names":["neither"],"action":"SCMP_ACT_ALLOW","excludes":{"caps":["CAP_SYS_ADMIN","CAP_BPF"]}},
        {"names":["unheard"],"action":"SCMP_ACT_ALLOW","includes":{"caps":["CAP_OF_TOMORROW"]}},
        {"names":["arm"],"action":"SCMP_ACT_ALLOW","includes":{"arches":["arm","arm64"]}},
        {"names":["not_amd"],"action":"SCMP_ACT_ALLOW","excludes":{"arches":["amd64"]}},
        {"names":["new"],"action":"SCMP_ACT_ALLOW","includes":{"minKernel":"4.8"}},
        {"names":["old"],"action":"SCMP_ACT_ALLOW","excludes":{"minKernel":"4.8"}}]}"#;
    let (admin, bpf) = (Capability::SysAdmin, Capability::Bpf);
    assert_eq!(
        names(json, &[], X86_64, (4, 8)),
        ["always", "neither", "new"]
    );
    assert_eq!(names(json, &[admin], X86_64, (4, 8)), ["always", "new"]);
    assert_eq!(
        names(json, &[admin, bpf], X86_64, (4, 8)),
        ["always", "both", "new"]
    );
    assert_eq!(
        names(json, &[], X86_64, (4, 7)),
        ["always", "neither", "old"]
    );
    assert_eq!(
        names(json, &[], Arch::ScmpArchAarch64, (5, 0)),
        ["always", "neither", "arm", "not_amd", "new"]
    );
}

#[test]
fn errors_have_names() {
    let profile = parse(
        r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":1,"defaultErrno":"ENOSYS",
            "syscalls":[{"names":["a"],"action":"SCMP_ACT_ERRNO","errno":"EINVAL","errnoRet":1},
                        {"names":["b"],"action":"SCMP_ACT_ERRNO","errno":"","errnoRet":7}]}"#,
    )
    .expect("a profile");
    assert_eq!(profile.default_errno_ret(), Some(38));
    let errnos: Vec<_> = profile
        .syscalls()
        .iter()
        .flatten()
        .map(|e| e.errno_ret())
        .collect();
    assert_eq!(errnos, [Some(22), Some(7)]);
}

#[test]
fn complaints_name_the_place_and_the_remedy() {
    let says = |json: &str, words: &[&str]| {
        let text = complaint(json);
        for word in words {
            assert!(text.contains(word), "{word:?} is not in {text:?}");
        }
    };
    says("", &["JSON", "line 1 column 0"]);
    says("not json", &["line 1 column"]);
    says("[]", &["JSON"]);
    says("{}", &["defaultAction"]);
    says(
        "{\n \"defaultAction\": \"SCMP_ACT_MAYBE\"\n}",
        &["SCMP_ACT_MAYBE", "SCMP_ACT_ERRNO", "line 2"],
    );
    says(
        "{\"defaultAction\":\"SCMP_ACT_ALLOW\",\n\"syscalls\":[{\"names\":[\"a\"],\"action\":\"SCMP_ACT_ERRNO\",\n\"args\":[{\"index\":0,\"value\":1,\"op\":\"LIKE\"}]}]}",
        &["LIKE", "line 3"],
    );
    says(
        "{\"defaultAction\":\"SCMP_ACT_ALLOW\",\n\"architectures\":[\"SCMP_ARCH_PDP11\"]}",
        &["SCMP_ARCH_PDP11", "line 2"],
    );
    says(
        r#"{"defaultAction":"SCMP_ACT_ALLOW","architectures":["SCMP_ARCH_X86"],"archMap":[{"architecture":"SCMP_ARCH_X86"}]}"#,
        &["both architectures and archMap"],
    );
    let with = |entry: &str| {
        format!(
            r#"{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{{"names":["a"],"action":"SCMP_ACT_LOG"}},{entry}]}}"#
        )
    };
    says(
        &with(r#"{"name":"a","names":["b"],"action":"SCMP_ACT_LOG"}"#),
        &["syscalls[1]", "both name and names"],
    );
    says(
        &with(r#"{"action":"SCMP_ACT_LOG"}"#),
        &["syscalls[1]", "names"],
    );
    says(
        &with(r#"{"names":[],"action":"SCMP_ACT_LOG"}"#),
        &["syscalls[1]", "names"],
    );
    says(
        &with(r#"{"names":["a"],"action":"SCMP_ACT_ERRNO","errno":"EWHAT"}"#),
        &["syscalls[1]", "EWHAT", "errnoRet"],
    );
    says(
        &with(r#"{"names":["a"],"action":"SCMP_ACT_LOG","includes":{"minKernel":"new"}}"#),
        &["syscalls[1].includes", "minKernel", "4.8"],
    );
    says(
        &with(
            r#"{"names":["a"],"action":"SCMP_ACT_LOG","args":[{"index":-1,"value":1,"op":"SCMP_CMP_EQ"}]}"#,
        ),
        &["line 1"],
    );
}

#[test]
fn the_cache_keeps_one_filter_for_each_profile_and_set() {
    let cache = ProfileCache::new();
    let (none, admin) = (
        Capabilities::new(),
        Capabilities::from([Capability::SysAdmin]),
    );
    let get = |source, caps| cache.get(source, caps).expect("a filter");
    let first = get(Source::RuntimeDefault, &none);
    assert!(Arc::ptr_eq(&first, &get(Source::RuntimeDefault, &none)));
    let other = get(Source::RuntimeDefault, &admin);
    assert_ne!(first.instructions, other.instructions);
    let localhost = br#"{"defaultAction":"SCMP_ACT_ALLOW"}"#;
    let open = get(Source::Localhost(localhost), &none);
    assert!(Arc::ptr_eq(
        &open,
        &get(Source::Localhost(localhost), &none)
    ));
    assert!(!Arc::ptr_eq(
        &open,
        &get(
            Source::Localhost(br#"{"defaultAction":"SCMP_ACT_ALLOW" }"#),
            &none
        )
    ));
    let oci = LinuxSeccomp::default();
    assert!(Arc::ptr_eq(
        &get(Source::Oci(&oci), &none),
        &get(Source::Oci(&oci), &none)
    ));
    assert_eq!(cache.len(), 5);
    // What fails is told each time and not kept.
    assert!(cache.get(Source::Localhost(b"{"), &none).is_err());
    assert!(cache.get(Source::Localhost(b"{"), &none).is_err());
    assert_eq!(cache.len(), 5);
}

#[test]
fn the_cache_serves_many_threads_and_has_an_end() {
    let cache = ProfileCache::new();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let cache = &cache;
            scope.spawn(move || {
                for i in 0..200 {
                    let errno = 1 + (i + thread * 50) % 1000;
                    let json = format!(
                        r#"{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{{"names":["acct"],"action":"SCMP_ACT_ERRNO","errnoRet":{errno}}}]}}"#
                    );
                    let filter = cache.get(Source::Localhost(json.as_bytes()), &Capabilities::new()).expect("a filter");
                    assert!(filter.instructions.iter().any(|i| i.k == 0x0005_0000 | errno), "someone else's filter");
                }
            });
        }
    });
    let distinct = cache.len();
    assert!(distinct <= 350, "{distinct}");
    for errno in 1001..1700 {
        let json = format!(
            r#"{{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{{"names":["acct"],"action":"SCMP_ACT_ERRNO","errnoRet":{errno}}}]}}"#
        );
        cache
            .get(Source::Localhost(json.as_bytes()), &Capabilities::new())
            .expect("a filter");
    }
    assert_eq!(cache.len(), 512, "the oldest go");
    assert!(!cache.is_empty());
}
