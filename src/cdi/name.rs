//! Names of devices, and the annotations that ask for them.

use std::fmt;

/// What is before the name in the key of an annotation that asks for devices.
const PREFIX: &str = "cdi.k8s.io/";

/// A fully qualified name: `vendor.example/class=device`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceName {
    kind: String,
    device: String,
}

/// A name that can't be one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no {what}: {reason}")]
pub struct NameError {
    what: &'static str,
    text: String,
    reason: &'static str,
}

impl NameError {
    fn new(what: &'static str, text: &str, reason: &'static str) -> Self {
        let text = text.chars().take(200).collect();
        Self { what, text, reason }
    }
}

impl DeviceName {
    /// Takes a name apart and checks its parts.
    ///
    /// # Errors
    /// [`NameError`], which says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let bad = |reason| NameError::new("CDI device name", text, reason);
        let form = "it must be vendor/class=device";
        let (kind, device) = text.split_once('=').ok_or_else(|| bad(form))?;
        check_kind(kind).map_err(bad)?;
        check_device(device).map_err(bad)?;
        Ok(Self {
            kind: kind.to_owned(),
            device: device.to_owned(),
        })
    }

    /// `vendor/class`.
    pub fn kind(&self) -> &str {
        &self.kind
    }

    /// The device's name among those of its kind.
    pub fn device(&self) -> &str {
        &self.device
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.kind, self.device)
    }
}

fn shaped(text: &str, first: fn(&u8) -> bool, others: &[u8]) -> bool {
    let bytes = text.as_bytes();
    bytes.first().is_some_and(first)
        && bytes.last().is_some_and(u8::is_ascii_alphanumeric)
        && bytes
            .iter()
            .all(|b| b.is_ascii_alphanumeric() || others.contains(b))
}

/// Checks a `vendor/class`.
pub(crate) fn check_kind(kind: &str) -> Result<(), &'static str> {
    let (vendor, class) = kind
        .split_once('/')
        .ok_or("it must begin with vendor/class")?;
    if !shaped(vendor, u8::is_ascii_alphabetic, b"_-.") {
        return Err(
            "the vendor must be made of letters, digits, _, - and ., begin with a letter \
                    and not end in a sign",
        );
    }
    if !shaped(class, u8::is_ascii_alphabetic, b"_-.") {
        return Err(
            "the class must be made of letters, digits, _, - and ., begin with a letter \
                    and not end in a sign",
        );
    }
    Ok(())
}

/// Checks a device's name among those of its kind.
pub(crate) fn check_device(device: &str) -> Result<(), &'static str> {
    if shaped(device, u8::is_ascii_alphanumeric, b"_-.:") {
        return Ok(());
    }
    Err(
        "the device must be made of letters, digits, _, -, . and :, and begin and end with \
         a letter or digit",
    )
}

/// The devices that annotations ask for: keys `cdi.k8s.io/<any name>`, values lists of names with commas
/// between. In the order of the keys, so that the same request is always the same.
///
/// # Errors
/// [`NameError`] for a bad key or name.
pub fn from_annotations<'a>(
    annotations: impl IntoIterator<Item = (&'a String, &'a String)>,
) -> Result<Vec<String>, NameError> {
    let mut asked: Vec<(&str, &str, &str)> = annotations
        .into_iter()
        .filter_map(|(key, value)| {
            let name = key.strip_prefix(PREFIX)?;
            Some((name, key.as_str(), value.as_str()))
        })
        .collect();
    asked.sort_unstable();
    let mut devices = Vec::new();
    for (name, key, value) in asked {
        if name.len() > 63 || !shaped(name, u8::is_ascii_alphanumeric, b"_-.") {
            let reason = "the part after cdi.k8s.io/ must be of at most 63 letters, digits, _, - and ., \
                          and begin and end with a letter or digit";
            return Err(NameError::new("annotation key", key, reason));
        }
        for device in value.split(',') {
            devices.push(DeviceName::parse(device)?.to_string());
        }
    }
    Ok(devices)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    #[test]
    fn names() {
        let good = [
            "vendor.com/gpu=0",
            "a/b=c",
            "nvidia.com/gpu=GPU-1:2.3_x",
            "v-1_2.x/c.d=all",
        ];
        for text in good {
            assert_eq!(DeviceName::parse(text).expect(text).to_string(), text);
        }
        let bad = [
            "", "=", "/", "a=b", "a/b", "a/=c", "/b=c", "a/b=", "1a/b=c", "a-/b=c", "a/1=c",
            "a/b-=c", "a/b=-c", "a/b=c.", "a/b=c=d", "a/b/c=d", "a/b=../x", "ä/b=c", "a/b=c\n",
            " a/b=c",
        ];
        for text in bad {
            assert!(DeviceName::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn annotations() {
        let map = |pairs: &[(&str, &str)]| -> HashMap<String, String> {
            let own = |(k, v): &(&str, &str)| ((*k).to_owned(), (*v).to_owned());
            pairs.iter().map(own).collect()
        };
        let good = map(&[
            ("cdi.k8s.io/b", "v/c=2"),
            ("cdi.k8s.io/a_1.x", "v/c=0,v/c=1"),
            ("other.k8s.io/a", "nonsense"),
        ]);
        assert_eq!(
            from_annotations(&good).unwrap(),
            ["v/c=0", "v/c=1", "v/c=2"]
        );
        let long = format!("cdi.k8s.io/{}", "x".repeat(64));
        for (key, value) in [
            ("cdi.k8s.io/", "v/c=0"),
            ("cdi.k8s.io/-a", "v/c=0"),
            ("cdi.k8s.io/a/b", "v/c=0"),
            (&long, "v/c=0"),
            ("cdi.k8s.io/a", ""),
            ("cdi.k8s.io/a", "v/c=0,"),
            ("cdi.k8s.io/a", "v/c=0, v/c=1"),
        ] {
            assert!(
                from_annotations(&map(&[(key, value)])).is_err(),
                "{key} {value}"
            );
        }
    }

    proptest! {
        #[test]
        fn what_is_taken_comes_out_as_it_went_in(text in "\\PC*") {
            if let Ok(name) = DeviceName::parse(&text) {
                prop_assert_eq!(name.to_string(), text);
            }
        }
    }
}
