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
                    "avg10" => stall.avg10 = value.parse().ok()?,
                    "avg60" => stall.avg60 = value.parse().ok()?,
                    "avg300" => stall.avg300 = value.parse().ok()?,
                    "total" => stall.total = value.parse().ok()?,
                    _ => {}
                }
            }
            known = true;
        }
        known.then_some(pressure)
    }
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
}
