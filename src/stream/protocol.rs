//! The subprotocols of remote commands and port forwarding, and their negotiation.

/// Where clients say in SPDY which protocols they know, and servers which one it is.
pub(crate) const VERSION_HEADER: &str = "x-stream-protocol-version";
/// What a server knows, said when there is no common protocol.
pub(crate) const ACCEPTED_HEADER: &str = "x-accepted-stream-protocol-versions";

/// The versions of remote commands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Version {
    V1,
    V2,
    /// Terminal sizes.
    V3,
    /// The end is told as JSON.
    V4,
    /// A client can close a WebSocket channel.
    V5,
}

impl Version {
    pub(crate) fn resizes(self) -> bool {
        self >= Self::V3
    }

    pub(crate) fn status_is_json(self) -> bool {
        self >= Self::V4
    }
}

/// What a remote command may speak over SPDY.
pub(crate) const SPDY_COMMAND: &[(&str, Version)] = &[
    ("v4.channel.k8s.io", Version::V4),
    ("v3.channel.k8s.io", Version::V3),
    ("v2.channel.k8s.io", Version::V2),
    ("channel.k8s.io", Version::V1),
];

/// What port forwarding may speak over SPDY.
pub(crate) const SPDY_FORWARD: &[(&str, ())] = &[("portforward.k8s.io", ())];

/// How channel messages are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// A byte for the channel, then the data.
    Binary,
    /// A digit for the channel, then the data in base64.
    Base64,
}

/// What a remote command may speak over WebSocket. A client that names nothing speaks the first
/// version.
pub(crate) const WS_COMMAND: &[(&str, (Version, Encoding))] = &[
    ("v5.channel.k8s.io", (Version::V5, Encoding::Binary)),
    ("v4.channel.k8s.io", (Version::V4, Encoding::Binary)),
    ("v4.base64.channel.k8s.io", (Version::V4, Encoding::Base64)),
    ("v3.channel.k8s.io", (Version::V3, Encoding::Binary)),
    ("v2.channel.k8s.io", (Version::V2, Encoding::Binary)),
    // Unlike SPDY's, WebSocket's first version always had the channel for terminal sizes.
    ("channel.k8s.io", (Version::V1, Encoding::Binary)),
    ("base64.channel.k8s.io", (Version::V1, Encoding::Base64)),
    ("", (Version::V1, Encoding::Binary)),
];

/// How ports are forwarded over WebSocket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Forwarding {
    /// Two channels for each port that was named when the URL was asked for.
    Channels(Encoding),
    /// A SPDY connection in the messages.
    Tunnel,
}

/// What port forwarding may speak over WebSocket.
pub(crate) const WS_FORWARD: &[(&str, Forwarding)] = &[
    ("SPDY/3.1+portforward.k8s.io", Forwarding::Tunnel),
    ("v4.channel.k8s.io", Forwarding::Channels(Encoding::Binary)),
    (
        "v4.base64.channel.k8s.io",
        Forwarding::Channels(Encoding::Base64),
    ),
    ("", Forwarding::Channels(Encoding::Binary)),
];

/// The first of the client's protocols that is known.
pub(crate) fn negotiate<T: Copy>(
    client: &[String],
    known: &[(&'static str, T)],
) -> Option<(&'static str, T)> {
    let mut common = client
        .iter()
        .filter_map(|name| known.iter().find(|(k, _)| k == name));
    common.next().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clients_first_known_protocol_is_taken() {
        let client = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
        let both = client(&[
            "v9.channel.k8s.io",
            "v3.channel.k8s.io",
            "v4.channel.k8s.io",
        ]);
        assert_eq!(
            negotiate(&both, SPDY_COMMAND),
            Some(("v3.channel.k8s.io", Version::V3))
        );
        assert_eq!(
            negotiate(&client(&["v5.channel.k8s.io"]), SPDY_COMMAND),
            None
        );
        assert_eq!(negotiate(&client(&[""]), SPDY_COMMAND), None);
        assert_eq!(
            negotiate(&client(&[""]), WS_COMMAND),
            Some(("", (Version::V1, Encoding::Binary)))
        );
    }
}
