//! Making a container's init: what lies between the creator and libcontainer's init.
//!
//! libcontainer's `ContainerBuilder` forks a process that makes a manager of cgroups (which reads the mount table
//! thirteen times), and that forks the init. Cgroups are ours, so the creator forks the init itself, which joins its
//! namespaces and mounts what the spec says ([`mounts`]); from there on it is libcontainer's `container_init_process`:
//! devices, hooks, `pivot_root`, sysctls, masked paths, and the wait for the start.

mod mounts;

use std::fs::{self, File};
use std::io::{self, Read, Write as _};
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use libcgroups::common::CgroupConfig;
use libcontainer::container::{Container, ContainerStatus};
use libcontainer::namespaces::Namespaces;
use libcontainer::network::network_device::dev_change_net_namespace;
use libcontainer::notify_socket::{NOTIFY_FILE, NotifyListener};
use libcontainer::process::args::{ContainerArgs, ContainerType};
use libcontainer::process::channel::{
    ChannelError, InitReceiver, InitSender, MainReceiver, MainSender, init_channel, main_channel,
};
use libcontainer::process::init::container_init_process;
use libcontainer::process::intel_rdt::setup_intel_rdt;
use libcontainer::syscall::syscall::{SyscallType, create_syscall};
use libcontainer::utils::validate_spec_for_net_devices;
use libcontainer::validator::Validator;
use libcontainer::workload::Executor;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Gid, Pid, Uid};
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Mount, Spec};

use crate::confine::chain;
use crate::descriptor;
use crate::sys::{self, CloneOptions, Forked};

pub use mounts::set_propagation;

/// Why there is no init.
#[derive(Debug, thiserror::Error)]
pub enum InitError {
    /// What the init said before it ended, or what libcontainer says of the spec.
    #[error("{0}")]
    Refused(String),
    /// A step of the creator's.
    #[error("can't {step}")]
    Step {
        /// What was attempted.
        step: &'static str,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// What the init is made of.
pub struct Init<'a> {
    /// The container's id.
    pub id: &'a str,
    /// The container's directory, its bundle for hooks.
    pub bundle: &'a Path,
    /// Directory for the socket that the init waits at.
    pub state: PathBuf,
    /// What [`crate::creator`] left of the spec.
    pub spec: Spec,
    /// Where the root file system is mounted; absolute, without links.
    pub rootfs: PathBuf,
    /// The last steps.
    pub executor: Box<dyn Executor>,
    /// Standard input, output and error.
    pub stdio: [OwnedFd; 3],
    /// Descriptors after those that the command inherits.
    pub preserve_fds: i32,
    /// `chroot(2)` in place of `pivot_root(2)`.
    pub no_pivot: bool,
}

/// Makes the init, a child of this process's parent, and waits until it waits for its start. Answers with its pid.
///
/// # Errors
/// [`InitError`]; then there is no init any more.
pub fn make(init: Init<'_>) -> Result<i32, InitError> {
    let refused = |e: &(dyn std::error::Error + 'static)| InitError::Refused(chain(e));
    let Init {
        id,
        bundle,
        state,
        mut spec,
        rootfs,
        executor,
        stdio,
        preserve_fds,
        no_pivot,
    } = init;
    Validator::validate_spec(&spec).map_err(|e| refused(&e))?;
    let syscall = create_syscall();
    validate_spec_for_net_devices(&spec, syscall.as_ref()).map_err(|e| refused(&e))?;
    fs::create_dir_all(&state).map_err(step("make the directory of libcontainer's state"))?;
    let rdt = spec.linux().as_ref().and_then(|l| l.intel_rdt().as_ref());
    let container = match spec.hooks().is_some() || rdt.is_some() {
        false => None,
        true => {
            let status = ContainerStatus::Creating;
            let made = Container::new(id, status, None, bundle, &state);
            let mut container = made.map_err(|e| refused(&e))?;
            container.set_annotations(spec.annotations().clone());
            Some(container)
        }
    };
    // Before anything is in namespaces that a container's processes are in, too (CVE-2016-9962).
    sys::prctl(libc::PR_SET_DUMPABLE, 0).map_err(step("become undumpable"))?;
    let entry = Entry::take(&mut spec);
    let network = entry.network.clone();
    let spec = Rc::new(spec);
    let [stdin, stdout, stderr] = stdio.map(IntoRawFd::into_raw_fd);
    let args = ContainerArgs {
        container_type: ContainerType::InitContainer,
        syscall: SyscallType::default(),
        spec: Rc::clone(&spec),
        rootfs,
        console_socket: None,
        notify_listener: NotifyListener::new(&state.join(NOTIFY_FILE)).map_err(|e| refused(&e))?,
        preserve_fds,
        container,
        user_ns_config: None,
        cgroup_config: CgroupConfig {
            cgroup_path: PathBuf::new(),
            systemd_cgroup: false,
            container_name: id.to_owned(),
        },
        detached: true,
        executor,
        no_pivot,
        stdin: Some(stdin),
        stdout: Some(stdout),
        stderr: Some(stderr),
        as_sibling: true,
        pid_file: None,
    };
    let (sender, receiver) = main_channel().map_err(|e| refused(&e))?;
    let (init_sender, init_receiver) = init_channel().map_err(|e| refused(&e))?;
    let (said, say) = descriptor::pipe().map_err(step("make a pipe"))?;
    let mut channels = Channels {
        sender,
        init_receiver,
        say,
    };
    let pid = fork(&entry, || {
        // Whoever asks the init something must learn of its end.
        let _ = init_sender.close();
        become_init(&args, &entry, &mut channels)
    })?;
    // Its copies are the only ones from here on, so that its end is the end of what it says.
    let closed = channels.sender.close();
    drop(channels.say);
    let mut container = args.container.clone();
    if let Some(container) = &mut container {
        container.set_pid(pid);
    }
    let waiting = Waiting {
        spec: &spec,
        container,
        id,
        pid,
        network,
    };
    let ready = closed
        .map_err(|e| chain(&e))
        .and_then(|()| waiting.wait(receiver, init_sender));
    ready.map_err(|error| {
        // It is stopped at some step, or gone: nobody has collected it, so the number is still its own.
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        InitError::Refused(words(said).unwrap_or(error))
    })?;
    Ok(pid)
}

/// What the init said before it ended.
fn words(said: OwnedFd) -> Option<String> {
    let flags = rustix::fs::fcntl_getfl(&said).ok()?;
    rustix::fs::fcntl_setfl(&said, flags | rustix::fs::OFlags::NONBLOCK).ok()?;
    let mut text = Vec::new();
    // To where nothing more is there: the error is expected.
    let _ = File::from(said).read_to_end(&mut text);
    (!text.is_empty()).then(|| String::from_utf8_lossy(&text).into_owned())
}

/// The creator, while the init is made ready.
struct Waiting<'a> {
    spec: &'a Spec,
    /// What libcontainer knows of the container; only if it is to be told to somebody.
    container: Option<Container>,
    id: &'a str,
    pid: i32,
    /// The network namespace, if the container has one of its own or joins one.
    network: Option<LinuxNamespace>,
}

impl Waiting<'_> {
    fn wait(&self, mut receiver: MainReceiver, mut sender: InitSender) -> Result<(), String> {
        let pid = self.container.as_ref().and_then(Container::pid);
        if let (Some(hooks), Some(container)) = (self.spec.hooks(), &self.container) {
            receiver.wait_for_hook_request().map_err(text)?;
            let run = |list: Option<&Vec<_>>| {
                libcontainer::hooks::run_hooks(list, Some(&container.state), None, pid, None)
                    .map_err(|e| chain(&e))
            };
            #[allow(deprecated)]
            run(hooks.prestart().as_ref())
                .map_err(|e| format!("failed to run prestart hooks: {e}"))?;
            run(hooks.create_runtime().as_ref())
                .map_err(|e| format!("failed to run createRuntime hooks: {e}"))?;
            sender.hook_done().map_err(text)?;
        }
        self.move_devices(&mut receiver, &mut sender)?;
        sender.close().map_err(text)?;
        receiver.wait_for_init_ready().map_err(text)?;
        let linux = self.spec.linux().as_ref();
        if let (Some(rdt), Some(pid)) = (linux.and_then(|l| l.intel_rdt().as_ref()), pid) {
            setup_intel_rdt(Some(self.id), &pid, rdt).map_err(|e| chain(&e))?;
        }
        Ok(())
    }

    /// Gives the container the network devices of `linux.netDevices`, which its init then sets up.
    fn move_devices(
        &self,
        receiver: &mut MainReceiver,
        sender: &mut InitSender,
    ) -> Result<(), String> {
        let linux = self.spec.linux().as_ref();
        let devices = linux.and_then(|l| l.net_devices().as_ref());
        let Some(devices) = devices.filter(|d| !d.is_empty()) else {
            return Ok(());
        };
        if self.network.is_none() {
            // The host's network has them already.
            return Ok(());
        }
        receiver.wait_for_network_setup_ready().map_err(text)?;
        let namespace = File::open(format!("/proc/{}/ns/net", self.pid))
            .map_err(|e| format!("can't open the container's network namespace: {e}"))?;
        let moved = devices.iter().map(|(name, device)| {
            let addresses = dev_change_net_namespace(name, namespace.as_raw_fd(), device);
            let addresses = addresses.map_err(|e| format!("network device {name}: {}", chain(&e)));
            Ok((name.clone(), addresses?))
        });
        let moved = moved.collect::<Result<_, String>>()?;
        sender.move_network_device(moved).map_err(text)
    }
}

fn text(error: ChannelError) -> String {
    chain(&error)
}

fn step(step: &'static str) -> impl Fn(io::Error) -> InitError {
    move |source| InitError::Step { step, source }
}

/// What the init holds on to.
struct Channels {
    sender: MainSender,
    init_receiver: InitReceiver,
    /// Where it says why it ends.
    say: OwnedFd,
}

/// The life of the init until its command is executed.
fn become_init(args: &ContainerArgs, entry: &Entry, channels: &mut Channels) -> ! {
    let _ = nix::sys::prctl::set_name(c"slipway:init");
    let error = match entry.enter(&args.rootfs) {
        Ok(()) => {
            let (sender, receiver) = (&mut channels.sender, &mut channels.init_receiver);
            match container_init_process(args, sender, receiver) {
                // The executor does not come back.
                Ok(()) => String::new(),
                Err(e) => chain(&e),
            }
        }
        Err(e) => e,
    };
    let _ = rustix::io::write(&channels.say, error.as_bytes());
    sys::exit_now(1)
}

/// Forks the init into the namespaces that only children enter.
fn fork(entry: &Entry, init: impl FnOnce()) -> Result<i32, InitError> {
    let sibling = || {
        sys::clone_process(&CloneOptions {
            sibling: true,
            ..CloneOptions::default()
        })
    };
    if entry.user.is_none() {
        let home = entry
            .outer
            .iter()
            .map(|namespace| open_own(namespace.typ()))
            .collect::<io::Result<Vec<_>>>()
            .map_err(step("open a namespace of this process"))?;
        entry.enter_outer().map_err(InitError::Refused)?;
        let forked = sibling().map_err(step("fork the container's init"))?;
        let Forked::Parent(pid) = forked else {
            init();
            sys::exit_now(1)
        };
        // Hooks run as children of this process.
        for namespace in home {
            setns(namespace, CloneFlags::empty())
                .map_err(|e| step("leave the container's namespaces")(e.into()))?;
        }
        return Ok(pid);
    }
    // From within a user namespace there is no way back, and this process's privileges are still needed.
    let (answer, answering) = descriptor::pipe().map_err(step("make a pipe"))?;
    match sibling().map_err(step("fork the container's init"))? {
        Forked::Child => {
            drop(answer);
            let forked = entry.enter_outer().and_then(|()| {
                sibling().map_err(|e| format!("can't fork the container's init: {e}"))
            });
            let (pid, error) = match forked {
                Ok(Forked::Child) => {
                    drop(answering);
                    init();
                    sys::exit_now(1)
                }
                Ok(Forked::Parent(pid)) => (pid, String::new()),
                Err(error) => (0, error),
            };
            let answer = [&pid.to_ne_bytes(), error.as_bytes()].concat();
            let _ = rustix::io::write(&answering, &answer);
            sys::exit_now(0)
        }
        Forked::Parent(_) => {
            drop(answering);
            let mut said = Vec::new();
            File::from(answer)
                .read_to_end(&mut said)
                .map_err(step("learn of the container's init"))?;
            match said.split_first_chunk() {
                Some((pid, [])) => Ok(i32::from_ne_bytes(*pid)),
                Some((_, error)) => Err(InitError::Refused(
                    String::from_utf8_lossy(error).into_owned(),
                )),
                None => Err(step("learn of the container's init")(
                    io::ErrorKind::UnexpectedEof.into(),
                )),
            }
        }
    }
}

fn open_own(kind: LinuxNamespaceType) -> io::Result<OwnedFd> {
    let name = match kind {
        LinuxNamespaceType::Time => "time",
        _ => "pid",
    };
    Ok(File::open(format!("/proc/self/ns/{name}"))?.into())
}

/// What the init enters before libcontainer goes on.
struct Entry {
    user: Option<LinuxNamespace>,
    /// Time and PID, which only children enter.
    outer: Vec<LinuxNamespace>,
    /// The others, but for that of mounts.
    inner: Vec<LinuxNamespace>,
    network: Option<LinuxNamespace>,
    /// The mount namespace, if it has one of its own or joins one.
    mount: Option<LinuxNamespace>,
    /// As `/proc/self/timens_offsets` takes them.
    time_offsets: String,
    hostname: Option<String>,
    domain_name: Option<String>,
    /// Propagation of the whole tree, while mounts are made in it.
    propagation: MsFlags,
    mounts: Vec<Mount>,
}

impl Entry {
    /// Takes out of the spec what this does instead of libcontainer.
    fn take(spec: &mut Spec) -> Self {
        let mounts = spec.mounts_mut().take().unwrap_or_default();
        spec.set_mounts(Some(Vec::new()));
        let (hostname, domain_name) = (spec.hostname().clone(), spec.domainname().clone());
        spec.set_hostname(None);
        let mut entry = Self {
            user: None,
            outer: Vec::new(),
            inner: Vec::new(),
            network: None,
            mount: None,
            time_offsets: String::new(),
            hostname,
            domain_name,
            propagation: MsFlags::MS_SLAVE,
            mounts,
        };
        let Some(linux) = spec.linux_mut().as_mut() else {
            return entry;
        };
        entry.propagation = match linux.rootfs_propagation().as_deref() {
            Some("shared") => MsFlags::MS_SHARED,
            Some("private") => MsFlags::MS_PRIVATE,
            _ => MsFlags::MS_SLAVE,
        };
        for (clock, offset) in linux.time_offsets().iter().flatten() {
            let (seconds, nanoseconds) = (offset.secs(), offset.nanosecs());
            entry.time_offsets += &format!(
                "{clock} {} {}\n",
                seconds.unwrap_or_default(),
                nanoseconds.unwrap_or_default()
            );
        }
        let mut left = Vec::new();
        for namespace in linux.namespaces_mut().take().unwrap_or_default() {
            match namespace.typ() {
                LinuxNamespaceType::User => entry.user = Some(namespace),
                LinuxNamespaceType::Time | LinuxNamespaceType::Pid => entry.outer.push(namespace),
                LinuxNamespaceType::Mount => {
                    entry.mount = Some(namespace.clone());
                    left.push(namespace);
                }
                LinuxNamespaceType::Network => {
                    entry.network = Some(namespace.clone());
                    entry.inner.push(namespace);
                }
                _ => entry.inner.push(namespace),
            }
        }
        linux.set_namespaces(Some(left));
        entry
    }

    /// Joins the namespace of users, and those that only children enter.
    fn enter_outer(&self) -> Result<(), String> {
        let failed = |e: io::Error| format!("can't set the offsets of the time namespace: {e}");
        // For root of a user namespace it is somebody else's file: this process can't be dumped.
        let offsets = match self.time_offsets.is_empty() {
            true => None,
            false => {
                let file = File::options()
                    .write(true)
                    .open("/proc/self/timens_offsets");
                Some(file.map_err(failed)?)
            }
        };
        if let Some(user) = &self.user {
            join(user)?;
            let (uid, gid) = (Uid::from_raw(0), Gid::from_raw(0));
            nix::unistd::setresgid(gid, gid, gid)
                .and_then(|()| nix::unistd::setresuid(uid, uid, uid))
                .map_err(|e| format!("can't become root in the user namespace: {e}"))?;
        }
        for namespace in &self.outer {
            join(namespace)?;
            let time = namespace.typ() == LinuxNamespaceType::Time && namespace.path().is_none();
            if let Some(mut file) = offsets.as_ref().filter(|_| time) {
                // All of them in one write.
                file.write_all(self.time_offsets.as_bytes())
                    .map_err(failed)?;
            }
        }
        Ok(())
    }

    /// Joins the other namespaces, and mounts.
    fn enter(&self, rootfs: &Path) -> Result<(), String> {
        self.inner.iter().try_for_each(join)?;
        let own_names =
            |n: &&LinuxNamespace| n.typ() == LinuxNamespaceType::Uts && n.path().is_none();
        if self.inner.iter().any(|n| own_names(&n)) {
            if let Some(name) = &self.hostname {
                nix::unistd::sethostname(name)
                    .map_err(|e| format!("can't set the host name {name:?}: {e}"))?;
            }
            if let Some(name) = &self.domain_name {
                create_syscall()
                    .set_domainname(name)
                    .map_err(|e| format!("can't set the domain name {name:?}: {}", chain(&e)))?;
            }
        }
        // The creator's own mount namespace will do for these mounts, of which libcontainer makes the container's: but
        // for a namespace that is joined, and for a user namespace's root, who may mount only in his own.
        if let Some(namespace) = &self.mount
            && (self.user.is_some() || namespace.path().is_some())
        {
            join(namespace)?;
        }
        mount(
            None::<&str>,
            "/",
            None::<&str>,
            self.propagation | MsFlags::MS_REC,
            None::<&str>,
        )
        .map_err(|e| format!("can't set the propagation of mounts: {e}"))?;
        mounts::mount_all(rootfs, &self.mounts).map_err(|e| chain(&e))
    }
}

/// Enters a namespace, or makes it.
fn join(namespace: &LinuxNamespace) -> Result<(), String> {
    let list = vec![namespace.clone()];
    let namespaces = Namespaces::try_from(Some(&list)).map_err(|e| chain(&e))?;
    namespaces.unshare_or_setns(namespace).map_err(|e| {
        let kind = namespace.typ();
        match namespace.path() {
            Some(path) => format!(
                "can't join the {kind} namespace {}: {}",
                path.display(),
                chain(&e)
            ),
            None => format!("can't make a {kind} namespace: {}", chain(&e)),
        }
    })
}
