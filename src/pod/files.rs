//! The files that every container of a pod gets: resolv.conf, hosts, hostname.

use std::net::IpAddr;
use std::path::Path;

use slipway_network::{DnsConfig, dns};

use super::error::{PodError, file};

/// File name of the pod's `/etc/resolv.conf`.
pub const RESOLV_CONF: &str = "resolv.conf";
/// File name of the pod's `/etc/hosts`.
pub const HOSTS: &str = "hosts";
/// File name of the pod's `/etc/hostname`.
pub const HOSTNAME: &str = "hostname";

/// What the files of a pod say.
pub struct Files {
    resolv_conf: String,
    hosts: Option<String>,
    hostname: String,
}

impl Files {
    /// The files of a pod, but for its addresses. With the host's network its `/etc/hosts` is the host's.
    ///
    /// # Errors
    /// [`PodError::Dns`], naming the setting.
    pub fn new(
        dns: Option<&DnsConfig>,
        hostname: &str,
        host_network: bool,
    ) -> Result<Self, PodError> {
        // A host without the file resolves nothing, and neither do its pods.
        let host = |path| std::fs::read_to_string(path).unwrap_or_default();
        Ok(Self {
            resolv_conf: dns::resolv_conf(dns, &host("/etc/resolv.conf")).map_err(PodError::Dns)?,
            hosts: host_network.then(|| host("/etc/hosts")),
            hostname: dns::hostname_file(hostname).map_err(PodError::Dns)?,
        })
    }

    /// Writes them into the pod's directory.
    ///
    /// # Errors
    /// [`PodError::File`].
    pub fn write(&self, dir: &Path, ips: &[IpAddr]) -> Result<(), PodError> {
        let hosts = match &self.hosts {
            Some(hosts) => hosts.clone(),
            None => dns::hosts_file(self.hostname.trim_end(), ips).map_err(PodError::Dns)?,
        };
        let texts = [
            (RESOLV_CONF, &self.resolv_conf),
            (HOSTS, &hosts),
            (HOSTNAME, &self.hostname),
        ];
        for (name, text) in texts {
            let path = dir.join(name);
            std::fs::write(&path, text).map_err(file("write", &path))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_names_the_pods_addresses_unless_the_network_is_the_hosts() {
        let dir = tempfile::tempdir().unwrap();
        let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
        let asked = DnsConfig {
            servers: vec!["10.0.0.10".into()],
            ..Default::default()
        };
        let files = Files::new(Some(&asked), "web-0", false).unwrap();
        files
            .write(dir.path(), &["10.1.2.3".parse().unwrap()])
            .unwrap();
        assert!(read(HOSTS).contains("10.1.2.3\tweb-0"), "{}", read(HOSTS));
        assert_eq!(read(RESOLV_CONF), "nameserver 10.0.0.10\n");
        assert_eq!(read(HOSTNAME), "web-0\n");
        let host = Files::new(None, "node", true).unwrap();
        host.write(dir.path(), &[]).unwrap();
        let of_host = std::fs::read_to_string("/etc/hosts").unwrap_or_default();
        assert_eq!(read(HOSTS), of_host);
        assert!(Files::new(None, "a\nb", false).is_err());
    }
}
