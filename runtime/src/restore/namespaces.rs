//! The namespaces of what is restored: the new pod's, whatever the images say.
//!
//! In criu's images, a process whose namespaces are those that criu was in is restored in those that criu is in then. So
//! the images are changed to say that of the namespaces that a pod's containers share, and of the cgroup namespace;
//! and criu runs in the new pod's. What is left to criu are the container's own PID and mount namespaces.

use std::path::Path;

use crate::criu::image::{self, Ids, Inventory, Process};

use super::{ImagesError, refused};

/// Has all processes of the images restored in the namespaces that criu will be in.
///
/// # Errors
/// [`ImagesError`]: the processes are in namespaces that can't be had.
pub fn set(images: &Path, inventory: &Inventory, processes: &[Process]) -> Result<(), ImagesError> {
    let criu = inventory.root_ids.as_ref();
    let criu =
        criu.ok_or_else(|| refused("criu's images do not say what namespaces criu was in"))?;
    let Some(first) = processes.first().filter(|first| first.ppid == 0) else {
        return Err(refused("criu's images begin with no init"));
    };
    if first.pid != 1
        || processes
            .iter()
            .skip(1)
            .any(|other| other.ppid == 0 || other.pid == 1)
    {
        return Err(refused(
            "the checkpoint is not of a container with a PID namespace of its own, and so can't be restored: its process \
             ids may be taken",
        ));
    }
    let file = |process: &Process| images.join(format!("ids-{}.img", process.pid));
    let init: Ids = image::read_one(&file(first))?;
    if !differ(init.pid_ns, criu.pid_ns) || !differ(init.mnt_ns, criu.mnt_ns) {
        return Err(refused(
            "the checkpoint's processes have no PID and mount namespaces of their own",
        ));
    }
    for process in processes {
        let path = file(process);
        let mut ids: Ids = image::read_one(&path)?;
        for (its, inits, crius, what) in [
            (ids.pid_ns, init.pid_ns, None, "PID"),
            (ids.mnt_ns, init.mnt_ns, None, "mount"),
            (ids.user_ns, init.user_ns, Some(criu.user_ns), "user"),
            // criu itself makes one, so that clocks go on; it has nothing but offsets.
            (ids.time_ns, init.time_ns, None, "time"),
            (ids.net_ns, init.net_ns, None, "network"),
            (ids.ipc_ns, init.ipc_ns, None, "IPC"),
            (ids.uts_ns, init.uts_ns, None, "UTS"),
        ] {
            // Processes that have ended have no namespaces.
            let wrong = its.is_some() && its != inits;
            if wrong || crius.is_some_and(|criu| differ(its, criu)) {
                return Err(refused(format!(
                    "process {} is in a {what} namespace of its own, which can't be restored",
                    process.pid
                )));
            }
        }
        ids.net_ns = ids.net_ns.and(criu.net_ns);
        ids.ipc_ns = ids.ipc_ns.and(criu.ipc_ns);
        ids.uts_ns = ids.uts_ns.and(criu.uts_ns);
        ids.cgroup_ns = ids.cgroup_ns.and(criu.cgroup_ns);
        image::write_one(&path, &ids)?;
    }
    Ok(())
}

fn differ(its: Option<u32>, criu: Option<u32>) -> bool {
    its.is_some() && its != criu
}

#[cfg(test)]
mod tests {
    use super::*;

    const CRIU: Ids = Ids {
        vm: 0,
        files: 0,
        fs: 0,
        sighand: 0,
        pid_ns: Some(1),
        net_ns: Some(2),
        ipc_ns: Some(3),
        uts_ns: Some(4),
        mnt_ns: Some(5),
        user_ns: Some(6),
        cgroup_ns: Some(7),
        time_ns: Some(8),
    };
    const OWN: Ids = Ids {
        pid_ns: Some(11),
        net_ns: Some(12),
        ipc_ns: Some(13),
        uts_ns: Some(14),
        mnt_ns: Some(15),
        cgroup_ns: Some(17),
        ..CRIU
    };

    fn process(pid: u32, ppid: u32) -> Process {
        Process {
            pid,
            ppid,
            threads: vec![pid],
        }
    }

    fn set_of(processes: &[Process], ids: &[Ids], criu: Option<Ids>) -> Result<Vec<Ids>, String> {
        let dir = tempfile::tempdir().unwrap();
        for (process, ids) in processes.iter().zip(ids) {
            let path = dir.path().join(format!("ids-{}.img", process.pid));
            std::fs::write(&path, "").unwrap();
            image::write_one(&path, ids).unwrap();
        }
        let inventory = Inventory {
            root_ids: criu,
            ..Inventory::default()
        };
        set(dir.path(), &inventory, processes).map_err(|e| e.to_string())?;
        let read = |p: &Process| image::read_one(&dir.path().join(format!("ids-{}.img", p.pid)));
        Ok(processes.iter().map(|p| read(p).unwrap()).collect())
    }

    #[test]
    fn what_a_pod_shares_becomes_the_new_pods() {
        let tree = [process(1, 0), process(9, 1)];
        let set = set_of(&tree, &[OWN, OWN], Some(CRIU)).unwrap();
        for ids in set {
            assert_eq!((ids.pid_ns, ids.mnt_ns), (Some(11), Some(15)));
            assert_eq!((ids.net_ns, ids.ipc_ns), (CRIU.net_ns, CRIU.ipc_ns));
            assert_eq!((ids.uts_ns, ids.cgroup_ns), (CRIU.uts_ns, CRIU.cgroup_ns));
        }
    }

    #[test]
    fn namespaces_that_cannot_be_had_are_refused() {
        let tree = [process(1, 0), process(9, 1)];
        let change = |change: fn(&mut Ids)| {
            let mut ids = OWN;
            change(&mut ids);
            ids
        };
        for (init, child) in [
            (change(|i| i.pid_ns = CRIU.pid_ns), OWN),
            (change(|i| i.mnt_ns = CRIU.mnt_ns), OWN),
            (
                change(|i| i.user_ns = Some(99)),
                change(|i| i.user_ns = Some(99)),
            ),
            (OWN, change(|i| i.time_ns = Some(99))),
            (OWN, change(|i| i.mnt_ns = Some(99))),
            (OWN, change(|i| i.net_ns = CRIU.net_ns)),
            (OWN, change(|i| i.pid_ns = Some(99))),
        ] {
            set_of(&tree, &[init, child], Some(CRIU)).unwrap_err();
        }
        set_of(&tree, &[OWN, OWN], None).unwrap_err();
        set_of(&[process(5, 0)], &[OWN], Some(CRIU)).unwrap_err();
        set_of(&[], &[], Some(CRIU)).unwrap_err();
        set_of(&[process(1, 0), process(2, 0)], &[OWN, OWN], Some(CRIU)).unwrap_err();
    }
}
