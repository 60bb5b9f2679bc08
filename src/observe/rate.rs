//! CPU use per second, from two samples.

/// Two samples closer to each other than this say more about the scheduler's ticks than about the container.
const LEAST_INTERVAL: i64 = 500_000_000;

/// The samples of one container or pod. Whoever asks gets the rate over the last interval that was long
/// enough; a second caller in between gets the same answer, and does not shorten the first one's interval.
#[derive(Debug, Clone, Copy, Default)]
pub struct Rate {
    base: Option<(i64, u64)>,
    nano_cores: Option<u64>,
}

impl Rate {
    /// Takes a sample (nanoseconds since the epoch, nanoseconds of CPU time) and returns the nanocores used
    /// lately; `None` until there are two samples far enough apart.
    pub fn sample(&mut self, at: i64, usage: u64) -> Option<u64> {
        match self.base {
            // The clock was set back, or the counter began anew.
            Some((then, before)) if at < then || usage < before => {
                *self = Self {
                    base: Some((at, usage)),
                    nano_cores: None,
                };
            }
            Some((then, _)) if at - then < LEAST_INTERVAL => {}
            Some((then, before)) => {
                let interval = u128::from((at - then).unsigned_abs());
                let used = u128::from(usage - before) * 1_000_000_000;
                self.nano_cores = u64::try_from(used / interval).ok();
                self.base = Some((at, usage));
            }
            None => self.base = Some((at, usage)),
        }
        self.nano_cores
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: i64 = 1_000_000_000;

    #[test]
    fn a_rate_needs_two_samples_with_time_between_them() {
        let mut rate = Rate::default();
        assert_eq!(rate.sample(SECOND, 100), None);
        assert_eq!(rate.sample(SECOND + 1, 1_000_000), None, "too soon");
        // Half a core for two seconds; the sample in between did not count.
        let half = Some(500_000_000);
        assert_eq!(rate.sample(3 * SECOND, 1_000_000_100), half);
        assert_eq!(rate.sample(3 * SECOND + 5, 1_000_000_200), half);
        assert_eq!(rate.sample(4 * SECOND, 1_000_000_100), Some(0));
    }

    #[test]
    fn counters_and_clocks_that_go_back_begin_anew() {
        let mut rate = Rate::default();
        rate.sample(SECOND, 100);
        rate.sample(2 * SECOND, 200);
        assert_eq!(rate.sample(3 * SECOND, 50), None);
        assert_eq!(rate.sample(4 * SECOND, 50), Some(0));
        assert_eq!(rate.sample(SECOND, 60), None);
    }
}
