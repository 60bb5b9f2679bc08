//! Amounts people type (sizes, CPU counts, durations) and amounts people read (sizes, ages).
use std::time::Duration;

/// An amount on the command line that can't be understood; the text says what would be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    /// Not a size in bytes.
    #[error(
        "'{0}' is not a size: write a number with an optional unit, such as 64m, 512MiB or 1Gi"
    )]
    Size(String),
    /// Not a number of CPUs.
    #[error("'{0}' is not a number of CPUs: write a number from 0.01 to 10000, such as 0.5 or 2")]
    Cpus(String),
    /// Not a duration.
    #[error(
        "'{0}' is not a duration: write seconds, or a number with ms, s, m or h, such as 500ms or 2m"
    )]
    Duration(String),
}

fn split_unit(text: &str) -> (&str, &str) {
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    text.split_at(end)
}

/// Reads a size in bytes: `k m g t` (also with `b` or `ib`) are powers of 1024, as docker's and
/// crictl's users expect.
///
/// # Errors
/// [`QuantityError::Size`] when the text is no such number or doesn't fit a CRI field (int64).
pub fn parse_size(text: &str) -> Result<i64, QuantityError> {
    let bad = || QuantityError::Size(text.to_owned());
    let (number, unit) = split_unit(text.trim());
    let power = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "ki" | "kib" => 1,
        "m" | "mb" | "mi" | "mib" => 2,
        "g" | "gb" | "gi" | "gib" => 3,
        "t" | "tb" | "ti" | "tib" => 4,
        _ => return Err(bad()),
    };
    let scale = 1024_i64.pow(power);
    if let Ok(whole) = number.parse::<i64>() {
        return whole.checked_mul(scale).ok_or_else(bad);
    }
    let value = number.parse::<f64>().map_err(|_| bad())? * scale as f64;
    if value.is_finite() && value < 9.0e18 {
        Ok(value as i64)
    } else {
        Err(bad())
    }
}

/// Reads a number of CPUs as a CFS quota in µs per period of 100 000 µs.
///
/// # Errors
/// [`QuantityError::Cpus`] when it isn't a number in the range that the kernel takes.
pub fn parse_cpus(text: &str) -> Result<i64, QuantityError> {
    match text.trim().parse::<f64>() {
        Ok(cpus) if (0.01..=10_000.0).contains(&cpus) => Ok((cpus * 100_000.0).round() as i64),
        _ => Err(QuantityError::Cpus(text.to_owned())),
    }
}

/// Reads a duration: a bare number is seconds; the units are `ms`, `s`, `m` and `h`.
///
/// # Errors
/// [`QuantityError::Duration`] when the text is no such number.
pub fn parse_duration(text: &str) -> Result<Duration, QuantityError> {
    let bad = || QuantityError::Duration(text.to_owned());
    let (number, unit) = split_unit(text.trim());
    let scale = match unit {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err(bad()),
    };
    let seconds = number.parse::<f64>().map_err(|_| bad())? * scale;
    Duration::try_from_secs_f64(seconds).map_err(|_| bad())
}

/// Writes a size in decimal units with three digits, as crictl prints image sizes (`7.67MB`).
pub fn human_size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "kB", "MB", "GB", "TB", "PB", "EB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit < UNITS.len() - 1 {
        value /= 1000.0;
        unit += 1;
    }
    let digits = match value {
        v if unit == 0 || v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        _ => 2,
    };
    let text = format!("{value:.digits$}");
    let text = if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.')
    } else {
        &text
    };
    format!("{text}{}", UNITS[unit])
}

/// Writes how long ago something was, in crictl's words (`2 minutes ago`).
pub fn human_age(age: Duration) -> String {
    let seconds = age.as_secs();
    let minutes = seconds / 60;
    let hours = (seconds as f64 / 3600.0).round() as u64;
    let text = match () {
        () if seconds < 1 => "Less than a second".to_owned(),
        () if seconds == 1 => "1 second".to_owned(),
        () if seconds < 60 => format!("{seconds} seconds"),
        () if minutes == 1 => "About a minute".to_owned(),
        () if minutes < 60 => format!("{minutes} minutes"),
        () if hours == 1 => "About an hour".to_owned(),
        () if hours < 48 => format!("{hours} hours"),
        () if hours < 24 * 7 * 2 => format!("{} days", hours / 24),
        () if hours < 24 * 30 * 2 => format!("{} weeks", hours / 24 / 7),
        () if hours < 24 * 365 * 2 => format!("{} months", hours / 24 / 30),
        () => format!("{} years", hours / 24 / 365),
    };
    format!("{text} ago")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("100", 100),
            ("64m", 64 << 20),
            ("64MB", 64 << 20),
            ("1Gi", 1 << 30),
            ("512 MiB", 512 << 20),
            ("1.5g", 3 << 29),
            ("2T", 2 << 40),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "m", "-1", "64x", "9999999999999t", "1..2", "1e400"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn cpus() {
        assert_eq!(parse_cpus("0.5"), Ok(50_000));
        assert_eq!(parse_cpus("2"), Ok(200_000));
        for text in ["0", "-1", "nan", "inf", "two", ""] {
            assert!(parse_cpus(text).is_err(), "{text}");
        }
    }

    #[test]
    fn durations() {
        assert_eq!(parse_duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(parse_duration("3"), Ok(Duration::from_secs(3)));
        assert_eq!(parse_duration("1.5m"), Ok(Duration::from_secs(90)));
        assert_eq!(parse_duration("1h"), Ok(Duration::from_secs(3600)));
        for text in ["", "ms", "-1s", "1d", "99999999999999999999999h"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_for_people() {
        for (bytes, text) in [
            (0, "0B"),
            (999, "999B"),
            (1000, "1kB"),
            (7_670_000, "7.67MB"),
            (42_100_000, "42.1MB"),
            (742_000, "742kB"),
            (10_000_000_000, "10GB"),
        ] {
            assert_eq!(human_size(bytes), text);
        }
    }

    #[test]
    fn ages_for_people() {
        for (seconds, text) in [
            (0, "Less than a second ago"),
            (1, "1 second ago"),
            (59, "59 seconds ago"),
            (60, "About a minute ago"),
            (120, "2 minutes ago"),
            (3600, "About an hour ago"),
            (7200, "2 hours ago"),
            (86_400 * 3, "3 days ago"),
            (86_400 * 21, "3 weeks ago"),
            (86_400 * 90, "3 months ago"),
            (86_400 * 365 * 3, "3 years ago"),
        ] {
            assert_eq!(human_age(Duration::from_secs(seconds)), text);
        }
    }

    proptest! {
        #[test]
        fn hostile_text_never_panics(text in ".{0,24}") {
            let _ = (parse_size(&text), parse_cpus(&text), parse_duration(&text));
        }

        #[test]
        fn whole_bytes_come_back(bytes in 0_i64..) {
            prop_assert_eq!(parse_size(&bytes.to_string()), Ok(bytes));
        }
    }
}
