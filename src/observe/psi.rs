//! Pressure stall information (Documentation/accounting/psi.rst).

/// How long tasks stood still for want of a resource.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Stall {
    /// Microseconds in total.
    pub total: u64,
    /// Share of the last 10 seconds, in percent.
    pub avg10: f64,
    /// Of the last minute.
    pub avg60: f64,
    /// Of the last five minutes.
    pub avg300: f64,
}

/// Pressure on one resource.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Pressure {
    /// At least one task stood still.
    pub some: Stall,
    /// All did.
    pub full: Stall,
}

impl Pressure {
    /// Reads a `*.pressure` file; `None` for what is none (the kernel fails reads when PSI is off).
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut pressure = Self::default();
        let mut known = false;
        for line in text.lines() {
            let (kind, fields) = line.split_once(' ')?;
            let stall = match kind {
                "some" => &mut pressure.some,
                "full" => &mut pressure.full,
                _ => continue,
            };
            for field in fields.split(' ') {
                let (key, value) = field.split_once('=')?;
                match key {
                    "avg10" => stall.avg10 = percent(value)?,
                    "avg60" => stall.avg60 = percent(value)?,
                    "avg300" => stall.avg300 = percent(value)?,
                    "total" => stall.total = value.parse().ok()?,
                    _ => {}
                }
            }
            known = true;
        }
        known.then_some(pressure)
    }
}

/// A number with two decimals, as the kernel prints shares. Hundredths are whole numbers, and so their division is
/// what a general parser would find; that is there for whatever else comes.
fn percent(text: &str) -> Option<f64> {
    if let [front @ .., b'.', a @ b'0'..=b'9', b @ b'0'..=b'9'] = text.as_bytes()
        && (1..=9).contains(&front.len())
        && front.iter().all(u8::is_ascii_digit)
    {
        let digits = front.iter().chain([a, b]);
        let hundredths = digits.fold(0, |sum: u64, digit| sum * 10 + u64::from(digit - b'0'));
        return Some(hundredths as f64 / 100.0);
    }
    text.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_lines_are_read() {
        let text = "some avg10=0.12 avg60=3.00 avg300=0.50 total=77\nfull avg10=0.00 avg60=1.00 avg300=0.00 total=5\n";
        let pressure = Pressure::parse(text).unwrap();
        assert_eq!(
            (
                pressure.some.avg10,
                pressure.some.avg60,
                pressure.some.avg300,
                pressure.some.total
            ),
            (0.12, 3.0, 0.5, 77)
        );
        assert_eq!((pressure.full.avg60, pressure.full.total), (1.0, 5));
        assert_eq!(Pressure::parse(""), None);
        assert_eq!(Pressure::parse("some total=many\n"), None);
    }

    #[test]
    fn shares_are_what_a_general_parser_finds() {
        for hundredths in 0..=10_000 {
            let text = format!("{}.{:02}", hundredths / 100, hundredths % 100);
            assert_eq!(percent(&text), text.parse().ok(), "{text}");
        }
        for other in ["1", "1.5", "0.125", "123456789012.25"] {
            assert_eq!(percent(other), other.parse().ok(), "{other}");
        }
        for bad in ["", ".25x", "a.25", "1.2x"] {
            assert_eq!(percent(bad), None, "{bad}");
        }
    }
}
