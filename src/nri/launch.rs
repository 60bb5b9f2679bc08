//! Plugins that the daemon starts itself: executables of a directory, with their configurations.

use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::net::UnixStream;
use tokio::process::{Child, Command};

use crate::error::{NriError, file};
use crate::name::PluginName;

/// The descriptor on which a plugin finds its connection.
const SOCKET: &str = "3";

/// A plugin to be started.
#[derive(Debug, PartialEq, Eq)]
pub struct Installed {
    /// From the file's name.
    pub name: PluginName,
    /// The executable.
    pub path: PathBuf,
    /// The text of its drop-in; empty without one.
    pub config: String,
}

/// The plugins of a directory, in the order of their names. There need not be one.
///
/// # Errors
/// [`NriError::Name`] for an executable that is not named as a plugin; [`NriError::File`].
pub fn discover(dir: &Path, config_dir: &Path) -> Result<Vec<Installed>, NriError> {
    let entries = match std::fs::read_dir(dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(file("list the NRI plugins in", dir))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(file("list the NRI plugins in", dir))?.path();
        // Links are followed: that is how plugins are enabled.
        let Ok(there) = std::fs::metadata(&path) else {
            continue;
        };
        if !there.is_file() || there.permissions().mode() & 0o111 == 0 {
            continue;
        }
        let base = path.file_name().unwrap_or_default().to_string_lossy();
        let name = PluginName::of_file(&base)
            .map_err(|e| NriError::Name(format!("{}: {e}", path.display())))?;
        let config = config(config_dir, &name)?;
        found.push(Installed { name, path, config });
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// The drop-in of one plugin: by preference that of its full name.
fn config(dir: &Path, name: &PluginName) -> Result<String, NriError> {
    for base in [format!("{name}.conf"), format!("{}.conf", name.name)] {
        let path = dir.join(base);
        match std::fs::read_to_string(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            read => return read.map_err(file("read the configuration of an NRI plugin,", path)),
        }
    }
    Ok(String::new())
}

impl Installed {
    /// Starts it, with one end of a connection as descriptor 3. It gets nothing of our environment, and is
    /// killed when what is returned is dropped.
    ///
    /// # Errors
    /// [`NriError::File`].
    pub fn start(&self) -> Result<(UnixStream, Child), NriError> {
        use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
        let failed = |source: std::io::Error| file("start the NRI plugin", &self.path)(source);
        let (ours, theirs) = socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(|e| failed(e.into()))?;
        let ours = std::os::unix::net::UnixStream::from(ours);
        ours.set_nonblocking(true).map_err(failed)?;
        let ours = UnixStream::from_std(ours).map_err(failed)?;
        let child = self.command(theirs).spawn().map_err(failed)?;
        Ok((ours, child))
    }

    /// A shell puts the connection where plugins look for it and becomes the plugin: what would do the same
    /// between fork and execve here is unsafe code.
    fn command(&self, theirs: OwnedFd) -> Command {
        let mut command = Command::new("/bin/sh");
        command
            .arg("-c")
            .arg("exec \"$0\" 3<&0 0</dev/null")
            .arg(&self.path)
            .env_clear()
            .env("NRI_PLUGIN_NAME", &self.name.name)
            .env("NRI_PLUGIN_IDX", &self.name.index)
            .env("NRI_PLUGIN_SOCKET", SOCKET)
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::inherit())
            .kill_on_drop(true);
        command
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(path: &Path, text: &str, mode: u32) {
        std::fs::write(path, text).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn plugins_and_their_configurations() {
        let root = tempfile::tempdir().unwrap();
        let (plugins, configs) = (root.path().join("p"), root.path().join("c"));
        assert_eq!(discover(&plugins, &configs).unwrap(), []);
        for dir in [&plugins, &configs] {
            std::fs::create_dir(dir).unwrap();
        }
        put(&plugins.join("20-b"), "", 0o755);
        put(&plugins.join("10-a"), "", 0o755);
        put(&plugins.join("README"), "", 0o644);
        std::fs::create_dir(plugins.join("sub")).unwrap();
        put(&configs.join("a.conf"), "general", 0o600);
        put(&configs.join("10-a.conf"), "own", 0o600);
        put(&configs.join("b.conf"), "general", 0o600);
        let found = discover(&plugins, &configs).unwrap();
        let shown: Vec<_> = found
            .iter()
            .map(|p| (p.name.to_string(), p.config.as_str()))
            .collect();
        assert_eq!(
            shown,
            [("10-a".to_owned(), "own"), ("20-b".to_owned(), "general")]
        );
        put(&plugins.join("nameless"), "", 0o755);
        let error = discover(&plugins, &configs).unwrap_err().to_string();
        assert!(error.contains("nameless"), "{error}");
    }

    #[tokio::test]
    async fn a_plugin_finds_its_connection_and_nothing_else() {
        use tokio::io::AsyncReadExt as _;
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("05-x");
        put(
            &path,
            "#!/bin/sh\necho $NRI_PLUGIN_NAME $NRI_PLUGIN_IDX $NRI_PLUGIN_SOCKET $HOME >&3\n",
            0o755,
        );
        let installed = Installed {
            name: PluginName::of_file("05-x").unwrap(),
            path,
            config: String::new(),
        };
        let (mut socket, mut child) = installed.start().unwrap();
        let mut text = String::new();
        socket.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "x 05 3\n");
        assert!(child.wait().await.unwrap().success());
    }
}
