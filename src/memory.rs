//! Keeps the daemon small between its efforts: the start, pulling images, and making and removing pods.
//!
//! They map most of the binary into the daemon, and that stays mapped as long as the page cache has room; and they leave
//! free memory in the heap. Once it is quiet, both are given back. Dropped, a page costs one minor fault when it is needed
//! again; it is read from the page cache.
//!
//! `unsafe` is here for madvise(2) and mallopt(3). Invariant: madvise is given mappings that are private, of a
//! file, and never writable, so every byte in them is the file's, and the kernel brings it back at
//! the next access.
#![allow(unsafe_code)]

use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::sync::Notify;

/// It is quiet when nothing was changed for so long; memory is given back then, or after at most twice that.
const QUIET: Duration = Duration::from_secs(1);

static EFFORT: Notify = Notify::const_new();

/// Says that something was done that takes memory. Costs next to nothing.
pub fn effort() {
    EFFORT.notify_one();
}

/// Gives memory back each time that it has become quiet after an [`effort`]; never ends.
pub async fn keep_small() {
    loop {
        quiet_after(&EFFORT).await;
        // It takes the locks of the heaps and of the address space for a moment.
        let _ = tokio::task::spawn_blocking(give_back).await;
    }
}

/// Waits for an effort, and then until there are no more.
async fn quiet_after(effort: &Notify) {
    effort.notified().await;
    loop {
        tokio::time::sleep(QUIET).await;
        // Whoever makes another effort meanwhile leaves a permit, and wakes nobody.
        if effort.notified().now_or_never().is_none() {
            return;
        }
    }
}

/// Has all threads share two heaps, in place of one each, which would keep their peaks for ever. Called
/// before there are threads.
pub fn share_heaps() {
    #[cfg(target_env = "gnu")]
    // SAFETY: sets a number in the allocator, which takes its own lock for it.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 2);
    }
}

/// Gives back the mapped pages of this program's own code and constants, and the free pages of the heap. What can't be
/// given stays; nothing depends on it.
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
    for (start, length) in constant(&maps, &program.to_string_lossy()) {
        // SAFETY: see the module's invariant; the range is one the kernel has just named, and the program is never
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

/// Start and length of the program's private mappings that never were writable (proc(5), `/proc/pid/maps`): its code,
/// and the constants at its beginning. Others that can only be read now hold what the dynamic linker has written.
fn constant(maps: &str, program: &str) -> Vec<(usize, usize)> {
    maps.lines()
        .filter_map(|line| {
            let (range, rest) = line.split_once(' ')?;
            let constant = rest.starts_with("r-xp ") || rest.starts_with("r--p 00000000 ");
            // A path with spaces is the rest of the line.
            if !constant || !rest.ends_with(&format!(" {program}")) {
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
    fn only_what_never_changes_is_given_back_and_it_goes_on() {
        let maps = "1000-3000 r--p 00000000 08:01 5 /bin/x\n3000-5000 r-xp 00002000 08:01 5   /bin/x\n\
                    5000-6000 r--p 00004000 08:01 5 /bin/x\n6000-7000 rw-p 00005000 08:01 5 /bin/x\n\
                    7000-8000 r-xp 00000000 08:01 6 /lib/libx.so\n8000-9000 r-xp 00000000 00:00 0 [vdso]\n\
                    9000-a000 rwxp 00000000 08:01 5 /bin/x\na000-b000 r--p 00000000 08:01 6 /lib/libx.so\n";
        assert_eq!(
            constant(maps, "/bin/x"),
            [(0x1000, 0x2000), (0x3000, 0x2000)]
        );
        give_back();
        assert_eq!(constant("", "/bin/x"), []);
    }

    #[tokio::test(start_paused = true)]
    async fn efforts_are_followed_by_quiet() {
        let effort = Notify::new();
        let begin = tokio::time::Instant::now();
        let wait = quiet_after(&effort);
        tokio::pin!(wait);
        for _ in 0..20 {
            effort.notify_one();
            let early = tokio::time::timeout(QUIET / 2, &mut wait).await;
            assert!(early.is_err(), "after {:?}", begin.elapsed());
        }
        wait.await;
        assert!(begin.elapsed() <= QUIET * 12, "{:?}", begin.elapsed());
        let nothing = tokio::time::timeout(QUIET * 9, quiet_after(&effort)).await;
        assert!(nothing.is_err(), "there was no other effort");
    }
}
