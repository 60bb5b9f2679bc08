//! The files that make names work inside a pod: `resolv.conf`, `hosts` and `hostname`. Pure
//! functions from what the pod asks for to the file's text.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv6Addr};
use thiserror::Error;

/// The kernel's bound for a host name.
const MAX_HOSTNAME: usize = 64;
/// A full domain name has at most 253 characters; a final dot may follow.
const MAX_DOMAIN: usize = 254;
/// No resolver has an option near this length.
const MAX_OPTION: usize = 255;

/// Why a DNS setting can't be written into a file.
#[derive(Debug, Error, PartialEq, Eq)]
#[allow(missing_docs)] // The messages say it.
pub enum DnsError {
    #[error("DNS server {0:?} is not an IP address")]
    Server(String),
    #[error(
        "DNS search domain {0:?} is not one domain name: it must be without space and control characters and not longer than {MAX_DOMAIN}"
    )]
    Search(String),
    #[error("DNS option {0:?} is not one option: it must be without space and control characters")]
    Option(String),
    #[error(
        "host name {0:?} is not valid: use 1 to {MAX_HOSTNAME} letters, digits, '-', '_' and '.'"
    )]
    Hostname(String),
}

/// DNS as a pod asks for it (CRI `DNSConfig`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DnsConfig {
    /// Addresses of name servers.
    pub servers: Vec<String>,
    /// Domains to search.
    pub searches: Vec<String>,
    /// Resolver options, such as `ndots:5`.
    pub options: Vec<String>,
}

impl DnsConfig {
    /// Nothing is asked for, so the host's file applies.
    pub fn is_empty(&self) -> bool {
        self.servers.is_empty() && self.searches.is_empty() && self.options.is_empty()
    }

    /// Checks every entry; one with a line break in it would write lines of its own.
    ///
    /// # Errors
    ///
    /// Names the first entry that is not what it should be.
    pub fn check(&self) -> Result<(), DnsError> {
        if let Some(bad) = self.servers.iter().find(|server| !is_server(server)) {
            return Err(DnsError::Server(shorten(bad)));
        }
        if let Some(bad) = self
            .searches
            .iter()
            .find(|domain| !is_word(domain, MAX_DOMAIN))
        {
            return Err(DnsError::Search(shorten(bad)));
        }
        if let Some(bad) = self
            .options
            .iter()
            .find(|option| !is_word(option, MAX_OPTION))
        {
            return Err(DnsError::Option(shorten(bad)));
        }
        Ok(())
    }
}

/// A pod's `resolv.conf` (resolv.conf(5)): from `dns`, or the host's text when nothing is asked for.
///
/// # Errors
///
/// When an entry can't stand in the file; see [`DnsConfig::check`].
pub fn resolv_conf(dns: Option<&DnsConfig>, host: &str) -> Result<String, DnsError> {
    let Some(dns) = dns.filter(|dns| !dns.is_empty()) else {
        return Ok(host.to_owned());
    };
    dns.check()?;
    let mut text = String::new();
    if !dns.searches.is_empty() {
        line(&mut text, "search", &dns.searches.join(" "));
    }
    for server in &dns.servers {
        line(&mut text, "nameserver", server);
    }
    if !dns.options.is_empty() {
        line(&mut text, "options", &dns.options.join(" "));
    }
    Ok(text)
}

/// A pod's `/etc/hosts` (hosts(5)): the standard names of the loopback addresses, then the pod's
/// addresses with its host name. For a pod on the host's network use the host's own file instead.
///
/// # Errors
///
/// When the host name can't stand in the file.
pub fn hosts_file(hostname: &str, ips: &[IpAddr]) -> Result<String, DnsError> {
    check_hostname(hostname)?;
    let mut text = String::from(
        "# Written by Slipway for this pod.\n\
         127.0.0.1\tlocalhost\n\
         ::1\tlocalhost ip6-localhost ip6-loopback\n\
         fe00::0\tip6-localnet\n\
         ff00::0\tip6-mcastprefix\n\
         ff02::1\tip6-allnodes\n\
         ff02::2\tip6-allrouters\n",
    );
    // A full name is followed by its first label, as the alias that people type.
    let alias = match hostname.split_once('.') {
        Some((label, _)) if !label.is_empty() => format!(" {label}"),
        _ => String::new(),
    };
    for ip in ips {
        // Writing to a string can't fail.
        let _ = writeln!(text, "{ip}\t{hostname}{alias}");
    }
    Ok(text)
}

/// A pod's `/etc/hostname` (hostname(5)).
///
/// # Errors
///
/// When it is no host name.
pub fn hostname_file(hostname: &str) -> Result<String, DnsError> {
    check_hostname(hostname)?;
    Ok(format!("{hostname}\n"))
}

/// Checks that a name may become a UTS host name and stand in `/etc/hosts`.
///
/// # Errors
///
/// When it is empty, too long for the kernel, or holds anything but letters, digits, `-`, `_`, `.`.
pub fn check_hostname(hostname: &str) -> Result<(), DnsError> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    if !hostname.is_empty() && hostname.len() <= MAX_HOSTNAME && hostname.bytes().all(plain) {
        return Ok(());
    }
    Err(DnsError::Hostname(shorten(hostname)))
}

fn line(text: &mut String, keyword: &str, value: &str) {
    let _ = writeln!(text, "{keyword} {value}");
}

/// An address; an IPv6 one may have a zone.
fn is_server(text: &str) -> bool {
    match text.split_once('%') {
        Some((ip, zone)) => ip.parse::<Ipv6Addr>().is_ok() && is_word(zone, 15),
        None => text.parse::<IpAddr>().is_ok(),
    }
}

fn is_word(text: &str, longest: usize) -> bool {
    !text.is_empty()
        && text.len() <= longest
        && !text.chars().any(|c| c.is_whitespace() || c.is_control())
}

fn shorten(text: &str) -> String {
    text.chars().take(80).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn dns(servers: &[&str], searches: &[&str], options: &[&str]) -> DnsConfig {
        let own = |list: &[&str]| list.iter().map(|s| (*s).to_owned()).collect();
        DnsConfig {
            servers: own(servers),
            searches: own(searches),
            options: own(options),
        }
    }

    #[test]
    fn resolv_conf_says_what_was_asked_or_what_the_host_says() {
        let host = "nameserver 192.0.2.1\n";
        assert_eq!(resolv_conf(None, host).unwrap(), host);
        assert_eq!(
            resolv_conf(Some(&DnsConfig::default()), host).unwrap(),
            host
        );
        let asked = dns(
            &["10.96.0.10", "fe80::1%eth0"],
            &["ns.svc.cluster.local", "cluster.local", "."],
            &["ndots:5", "edns0"],
        );
        assert_eq!(
            resolv_conf(Some(&asked), host).unwrap(),
            "search ns.svc.cluster.local cluster.local .\n\
             nameserver 10.96.0.10\nnameserver fe80::1%eth0\noptions ndots:5 edns0\n"
        );
        let options_only = dns(&[], &[], &["ndots:1"]);
        assert_eq!(
            resolv_conf(Some(&options_only), host).unwrap(),
            "options ndots:1\n"
        );
    }

    #[test]
    fn entries_that_would_write_more_than_themselves_are_refused() {
        for server in [
            "",
            "dns.example",
            "1.1.1.1\nnameserver 6.6.6.6",
            "1.1.1.1%x",
            "::1%a b",
        ] {
            let error = resolv_conf(Some(&dns(&[server], &[], &[])), "").unwrap_err();
            assert!(matches!(error, DnsError::Server(_)), "{server}");
        }
        for word in ["", "a b", "a\nnameserver 6.6.6.6", "a\u{85}b", "a\0"] {
            let error = resolv_conf(Some(&dns(&[], &[word], &[])), "").unwrap_err();
            assert!(matches!(error, DnsError::Search(_)), "{word}");
            let error = resolv_conf(Some(&dns(&[], &[], &[word])), "").unwrap_err();
            assert!(matches!(error, DnsError::Option(_)), "{word}");
        }
        for name in ["", "a b", "a\n6.6.6.6 bank", "a#b", &"a".repeat(65), "ä"] {
            hosts_file(name, &[]).unwrap_err();
            hostname_file(name).unwrap_err();
        }
    }

    #[test]
    fn hosts_name_the_loopback_and_the_pod() {
        let ips = ["10.0.0.7".parse().unwrap(), "fd00::7".parse().unwrap()];
        let text = hosts_file("web-0.web.ns.svc", &ips).unwrap();
        assert!(text.contains("127.0.0.1\tlocalhost\n"));
        assert!(text.contains("::1\tlocalhost "));
        assert!(
            text.ends_with("10.0.0.7\tweb-0.web.ns.svc web-0\nfd00::7\tweb-0.web.ns.svc web-0\n")
        );
        assert!(
            hosts_file("web", &ips)
                .unwrap()
                .ends_with("10.0.0.7\tweb\nfd00::7\tweb\n")
        );
        assert_eq!(hostname_file("web").unwrap(), "web\n");
    }

    proptest! {
        #[test]
        fn an_accepted_entry_makes_exactly_one_line(text in "[ -~\\n\\r\\t\u{b}\u{85}]{0,40}") {
            for asked in [dns(&[&text], &[], &[]), dns(&[], &[&text], &[]), dns(&[], &[], &[&text])] {
                if let Ok(file) = resolv_conf(Some(&asked), "host\n") {
                    prop_assert_eq!(file.lines().count(), 1);
                    prop_assert_eq!(file.split_whitespace().count(), 2);
                }
            }
            if let Ok(file) = hostname_file(&text) {
                prop_assert_eq!(file.lines().count(), 1);
            }
        }
    }
}
