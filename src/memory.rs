//! Keeps the daemon small between its rare large efforts: the start, and pulling images.
//!
//! Both map most of the binary into the daemon, and that stays mapped as long as the page cache has room.
//! Dropped, a page costs one minor fault when it is needed again; it is read from the page cache.
//!
//! `unsafe` is here for madvise(2) and mallopt(3). Invariant: madvise is given mappings that are private, of a
//! file, executable and never writable, so every byte in them is the file's, and the kernel brings it back at
//! the next access.
#![allow(unsafe_code)]

/// Has all threads share two heaps, in place of one each, which would keep their peaks for ever. Called
/// before there are threads.
pub fn share_heaps() {
    #[cfg(target_env = "gnu")]
    // SAFETY: sets a number in the allocator, which takes its own lock for it.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 2);
    }
}

/// Gives back the mapped pages of this program's own code and free heap at its end. What can't be given
/// stays; nothing depends on it.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: only touches free memory, under the allocator's own locks.
    unsafe {
        libc::malloc_trim(0);
    }
    let Ok(maps) = std::fs::read_to_string("/proc/self/maps") else {
        return;
    };
    let Ok(program) = std::fs::read_link("/proc/self/exe") else {
        return;
    };
    for (start, length) in code_of(&maps, &program.to_string_lossy()) {
        // SAFETY: see the module's invariant; the range is one the kernel has just named, and code is never
        // unmapped in this process.
        let result = unsafe {
            libc::madvise(
                std::ptr::with_exposed_provenance_mut(start),
                length,
                libc::MADV_DONTNEED,
            )
        };
        if result != 0 {
            tracing::debug!(error = %std::io::Error::last_os_error(), "can't give code pages back");
        }
    }
}

/// Start and length of the program's executable private mappings (proc(5), `/proc/pid/maps`).
fn code_of(maps: &str, program: &str) -> Vec<(usize, usize)> {
    maps.lines()
        .filter_map(|line| {
            let (range, rest) = line.split_once(' ')?;
            // A path with spaces is the rest of the line.
            if !rest.starts_with("r-xp ") || !rest.ends_with(&format!(" {program}")) {
                return None;
            }
            let (start, end) = range.split_once('-')?;
            let number = |text| usize::from_str_radix(text, 16).ok();
            let (start, end) = (number(start)?, number(end)?);
            Some((start, end.checked_sub(start)?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_code_is_given_back_and_it_goes_on() {
        let maps = "1000-3000 r--p 0 08:01 5 /bin/x\n3000-5000 r-xp 2000 08:01 5   /bin/x\n\
                    5000-6000 r--p 0 08:01 5 /bin/x\n6000-7000 rw-p 0 08:01 5 /bin/x\n\
                    7000-8000 r-xp 0 08:01 6 /lib/libx.so\n8000-9000 r-xp 0 00:00 0 [vdso]\n\
                    9000-a000 rwxp 0 08:01 5 /bin/x\n";
        assert_eq!(code_of(maps, "/bin/x"), [(0x3000, 0x2000)]);
        give_back();
        assert_eq!(code_of("", "/bin/x"), []);
    }
}
