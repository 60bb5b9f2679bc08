//! Paths that come from requests.

use crate::error::{Result, SpecError, quoted};
use std::path::{Component, Path};

/// PATH_MAX without its NUL.
const LONGEST: usize = 4095;
/// NAME_MAX.
const LONGEST_NAME: usize = 255;

/// Accepts an absolute path without `..`, which a kernel could take.
pub(crate) fn absolute(field: &str, path: &str) -> Result<()> {
    plain(field, path)?;
    if path.starts_with('/') {
        return Ok(());
    }
    Err(SpecError::invalid(
        field,
        format!("{} must be an absolute path", quoted(path)),
    ))
}

/// Accepts a relative path that stays below where it starts.
pub(crate) fn relative(field: &str, path: &str) -> Result<()> {
    plain(field, path)?;
    if !path.starts_with('/') && Path::new(path).components().any(is_name) {
        return Ok(());
    }
    Err(SpecError::invalid(
        field,
        format!("{} must be a relative path", quoted(path)),
    ))
}

fn is_name(component: Component<'_>) -> bool {
    matches!(component, Component::Normal(_))
}

fn plain(field: &str, path: &str) -> Result<()> {
    let wrong = |what: &str| {
        let text = if path.is_empty() {
            what.to_owned()
        } else {
            format!("{} {what}", quoted(path))
        };
        Err(SpecError::invalid(field, text))
    };
    if path.is_empty() {
        return wrong("must not be empty");
    }
    if path.chars().any(char::is_control) {
        return wrong("has a control character in it");
    }
    if path.len() > LONGEST || path.split('/').any(|name| name.len() > LONGEST_NAME) {
        return wrong("is too long for a path");
    }
    if path.split('/').any(|name| name == "..") {
        return wrong("must not contain \"..\"");
    }
    Ok(())
}

/// The path without `.`, doubled and trailing slashes.
pub(crate) fn clean(path: &str) -> std::path::PathBuf {
    Path::new(path)
        .components()
        .filter(|c| *c != Component::CurDir)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn forms() {
        for good in ["/", "/a", "/a/b c", "//a/./b/", "/..a/b.."] {
            assert_eq!(absolute("f", good), Ok(()), "{good}");
        }
        for bad in [
            "", "a", "./a", "/a/..", "/../a", "/a\nb", "/a\0", "..", "/\u{7f}",
        ] {
            assert!(absolute("f", bad).is_err(), "{bad:?}");
        }
        for good in ["a", "a/b.log", "./a", "a..b"] {
            assert_eq!(relative("f", good), Ok(()), "{good}");
        }
        for bad in [
            "",
            "/",
            ".",
            "./",
            "/a",
            "../a",
            "a/../../b",
            "a/..",
            "a\nb",
        ] {
            assert!(relative("f", bad).is_err(), "{bad:?}");
        }
        assert!(absolute("f", &format!("/{}", "a".repeat(256))).is_err());
        assert!(absolute("f", &"/aaaaaaa".repeat(600)).is_err());
        assert_eq!(clean("//a/./b/"), Path::new("/a/b"));
    }

    proptest! {
        #[test]
        fn accepted_paths_stay_below(path in "[./a\\PC]{0,12}") {
            if relative("f", &path).is_ok() {
                let joined = clean(&format!("/top/{path}"));
                prop_assert!(joined.starts_with("/top") && joined != Path::new("/top"));
                prop_assert!(!joined.components().any(|c| c == Component::ParentDir));
            }
            if absolute("f", &path).is_ok() {
                prop_assert!(clean(&path).is_absolute());
            }
        }
    }
}
