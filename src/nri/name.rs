//! Names of plugins, and of what they remove.

use std::fmt;

use crate::error::NriError;

/// Names are the operator's; still they go into logs and messages.
const LONGEST: usize = 255;

/// Who a plugin is: when it is called (two digits), and its name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct PluginName {
    /// Two digits: plugins are called in this order.
    pub index: String,
    /// Its name without it.
    pub name: String,
}

impl PluginName {
    /// Checks what a plugin registers with.
    ///
    /// # Errors
    /// [`NriError::Name`].
    pub fn new(index: &str, name: &str) -> Result<Self, NriError> {
        let index = index.get(..LONGEST).unwrap_or(index);
        if index.len() != 2 || !index.bytes().all(|b| b.is_ascii_digit()) {
            let what = format!("the index {index:?} of an NRI plugin must be two digits");
            return Err(NriError::Name(what));
        }
        let letter = |b: u8| b.is_ascii_alphanumeric() || b"-_.+".contains(&b);
        if name.is_empty() || name.len() > LONGEST || !name.bytes().all(letter) {
            let shown: String = name.chars().take(LONGEST).collect();
            let what = format!(
                "the name {shown:?} of an NRI plugin must be made of letters, digits and -_.+"
            );
            return Err(NriError::Name(what));
        }
        Ok(Self {
            index: index.to_owned(),
            name: name.to_owned(),
        })
    }

    /// From the name of an executable, such as `10-logger`.
    ///
    /// # Errors
    /// [`NriError::Name`].
    pub fn of_file(file: &str) -> Result<Self, NriError> {
        let (index, name) = file.split_once('-').ok_or_else(|| {
            NriError::Name(format!(
                "{file:?} is no name of an NRI plugin, which is two digits, a dash and a name"
            ))
        })?;
        Self::new(index, name)
    }
}

impl fmt::Display for PluginName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.index, self.name)
    }
}

/// The key that an entry says is to be removed, if it does.
pub fn is_removal(key: &str) -> Option<&str> {
    key.strip_prefix('-')
}

/// The entry that says so.
pub fn removal(key: &str) -> String {
    format!("-{key}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let name = PluginName::of_file("05-dev-injector.v1").unwrap();
        assert_eq!(
            (name.index.as_str(), name.name.as_str()),
            ("05", "dev-injector.v1")
        );
        assert_eq!(name.to_string(), "05-dev-injector.v1");
        for bad in [
            "", "logger", "5-x", "005-x", "ab-x", "10-", "10-a b", "10-ä", "-x",
        ] {
            assert!(PluginName::of_file(bad).is_err(), "{bad}");
        }
        assert!(PluginName::new(&"9".repeat(300), "x").is_err());
        assert!(PluginName::new("10", &"x".repeat(300)).is_err());
        assert!(PluginName::new("١٠", "x").is_err());
        assert_eq!(is_removal("-a"), Some("a"));
        assert_eq!(is_removal("a"), None);
    }
}
