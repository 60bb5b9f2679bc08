//! What a container waits for, to end while nobody looks.

use std::path::PathBuf;

use super::{Container, Env, Pod, Result, cri};

/// Closed until it is opened.
pub struct Gate(PathBuf);

impl Gate {
    /// One of this name, below the test's directory.
    pub fn new(env: &Env, name: &str) -> Result<Self> {
        env.dir(name).map(Self)
    }

    /// A container that does this, in a shell, once the gate is open.
    pub async fn behind(&self, pod: &Pod, then: &str) -> Result<Container> {
        let mount = cri::Mount {
            host_path: self.0.display().to_string(),
            container_path: "/gate".into(),
            ..Default::default()
        };
        let script = format!("until [ -e /gate/open ]; do sleep 0.05; done; {then}");
        pod.run(&["sh", "-c", &script], |c| c.mounts = vec![mount])
            .await
    }

    pub fn open(&self) -> Result<()> {
        Ok(std::fs::write(self.0.join("open"), "")?)
    }
}
