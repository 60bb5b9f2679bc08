//! The running kernel's version.

use std::sync::LazyLock;

/// Major and minor version of the running kernel; (0, 0), which allows least, when its release does not
/// begin with two numbers.
pub fn running_kernel() -> (u32, u32) {
    static KERNEL: LazyLock<(u32, u32)> = LazyLock::new(|| {
        let uname = rustix::system::uname();
        parse_release(&uname.release().to_string_lossy()).unwrap_or((0, 0))
    });
    *KERNEL
}

/// The first two numbers of `6.1.0-13-amd64` and of `4.8`.
pub(crate) fn parse_release(release: &str) -> Option<(u32, u32)> {
    let mut parts = release.split('.');
    let major = parts.next()?.parse().ok()?;
    let minor = parts.next()?;
    let digits = minor
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(minor.len());
    Some((major, minor[..digits].parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::parse_release;

    #[test]
    fn releases() {
        assert_eq!(parse_release("6.1.0-13-amd64"), Some((6, 1)));
        assert_eq!(parse_release("4.8"), Some((4, 8)));
        assert_eq!(parse_release("5.10-rc1"), Some((5, 10)));
        assert_eq!(parse_release("6"), None);
        assert_eq!(parse_release("six.one"), None);
        assert_eq!(parse_release("6."), None);
    }
}
