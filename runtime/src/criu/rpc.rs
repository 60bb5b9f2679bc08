//! The part of criu's RPC messages (`rpc.proto` of criu 3.17 to 4.2) that Slipway speaks, as facts of that
//! protocol: names and numbers are criu's, what it does not need is left out.

/// `criu_req_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum Kind {
    /// Nothing.
    Empty = 0,
    /// Dump a process tree.
    Dump = 1,
    /// Restore one.
    Restore = 2,
    /// criu tells of a step.
    Notify = 6,
    /// Which criu this is.
    Version = 10,
}

/// `criu_cg_mode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub enum CgroupMode {
    /// criu leaves cgroups alone.
    Ignore = 0,
}

/// `inherit_fd`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct InheritFd {
    /// What it stands for in the images: `pipe:[INODE]`.
    #[prost(string, required, tag = "1")]
    pub key: String,
    /// A descriptor of criu's.
    #[prost(int32, required, tag = "2")]
    pub fd: i32,
}

/// `criu_opts`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Options {
    /// Directory of the images: a descriptor of the process that made the socket.
    #[prost(int32, required, tag = "1")]
    pub images_dir_fd: i32,
    /// The root of the tree to dump.
    #[prost(int32, optional, tag = "2")]
    pub pid: Option<i32>,
    /// The tree goes on after the dump.
    #[prost(bool, optional, tag = "3")]
    pub leave_running: Option<bool>,
    /// Unix sockets whose other end is not dumped.
    #[prost(bool, optional, tag = "4")]
    pub ext_unix_sk: Option<bool>,
    /// Established TCP connections are dumped, and restored.
    #[prost(bool, optional, tag = "5")]
    pub tcp_established: Option<bool>,
    /// File locks are dumped.
    #[prost(bool, optional, tag = "8")]
    pub file_locks: Option<bool>,
    /// 0 to 4.
    #[prost(int32, optional, tag = "9")]
    pub log_level: Option<i32>,
    /// Name of the log in the work directory.
    #[prost(string, optional, tag = "10")]
    pub log_file: Option<String>,
    /// criu tells of its steps, and waits for an answer to each.
    #[prost(bool, optional, tag = "12")]
    pub notify_scripts: Option<bool>,
    /// The root file system of what is restored; a mount point.
    #[prost(string, optional, tag = "13")]
    pub root: Option<String>,
    /// Directory of log and statistics, as `images_dir_fd`.
    #[prost(int32, optional, tag = "17")]
    pub work_dir_fd: Option<i32>,
    /// Before `manage_cgroups_mode` there was only this.
    #[prost(bool, optional, tag = "24")]
    pub manage_cgroups: Option<bool>,
    /// What is restored becomes a child of the process that made the socket.
    #[prost(bool, optional, tag = "26")]
    pub rst_sibling: Option<bool>,
    /// Descriptors that take the place of what was open.
    #[prost(message, repeated, tag = "27")]
    pub inherit_fd: Vec<InheritFd>,
    /// What to do with cgroups.
    #[prost(enumeration = "CgroupMode", optional, tag = "34")]
    pub manage_cgroups_mode: Option<i32>,
    /// The largest deleted file that is still open and becomes part of the images, in bytes.
    #[prost(uint32, optional, tag = "35")]
    pub ghost_limit: Option<u32>,
    /// External objects: `mnt[PLACE]:NAME`, `net[INODE]:NAME`.
    #[prost(string, repeated, tag = "37")]
    pub external: Vec<String>,
    /// Directory of the cgroup that criu freezes while it stops the tree.
    #[prost(string, optional, tag = "44")]
    pub freeze_cgroup: Option<String>,
    /// Seconds that stopping the tree may take.
    #[prost(uint32, optional, tag = "45")]
    pub timeout: Option<u32>,
    /// TCP connections that are not yet accepted are left out.
    #[prost(bool, optional, tag = "46")]
    pub tcp_skip_in_flight: Option<bool>,
    /// A terminal whose master end is not dumped. When it is restored, a new one comes with [`TERMINAL`].
    #[prost(bool, optional, tag = "50")]
    pub orphan_pts_master: Option<bool>,
    /// Established TCP connections are closed in the restored tree.
    #[prost(bool, optional, tag = "52")]
    pub tcp_close: Option<bool>,
    /// `selinux:LABEL` or `apparmor:PROFILE` in place of those of the images.
    #[prost(string, optional, tag = "53")]
    pub lsm_profile: Option<String>,
}

/// The step with which the master end of a terminal comes.
pub const TERMINAL: &str = "orphan-pts-master";

/// `criu_notify`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Notify {
    /// The step.
    #[prost(string, optional, tag = "1")]
    pub script: Option<String>,
}

/// `criu_req`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Request {
    /// What is asked.
    #[prost(enumeration = "Kind", required, tag = "1")]
    pub kind: i32,
    /// How.
    #[prost(message, optional, tag = "2")]
    pub opts: Option<Options>,
    /// The answer to a notification.
    #[prost(bool, optional, tag = "3")]
    pub notify_success: Option<bool>,
}

/// `criu_restore_resp`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Restored {
    /// The root of the restored tree.
    #[prost(int32, required, tag = "1")]
    pub pid: i32,
}

/// `criu_resp`.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Response {
    /// What was asked.
    #[prost(enumeration = "Kind", required, tag = "1")]
    pub kind: i32,
    /// Whether it worked.
    #[prost(bool, required, tag = "2")]
    pub success: bool,
    /// What was restored.
    #[prost(message, optional, tag = "4")]
    pub restore: Option<Restored>,
    /// A step.
    #[prost(message, optional, tag = "5")]
    pub notify: Option<Notify>,
    /// An errno.
    #[prost(int32, optional, tag = "7")]
    pub cr_errno: Option<i32>,
    /// What went wrong first, since criu 3.16.
    #[prost(string, optional, tag = "9")]
    pub cr_errmsg: Option<String>,
}
