//! Durations of one operation, and what they amount to.
use std::time::Duration;

use serde::Serialize;

/// Durations of one operation, in ms.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Samples(Vec<f64>);

/// What samples amount to; all in ms.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Summary {
    /// Number of samples.
    pub count: usize,
    /// Arithmetic mean.
    pub mean: f64,
    /// Smallest.
    pub min: f64,
    /// Median.
    pub p50: f64,
    /// 95th percentile.
    pub p95: f64,
    /// 99th percentile.
    pub p99: f64,
    /// Largest.
    pub max: f64,
}

impl Samples {
    /// Adds a duration.
    pub fn push(&mut self, took: Duration) {
        self.0.push(took.as_secs_f64() * 1000.0);
    }

    /// The summary; none without samples.
    pub fn summary(&self) -> Option<Summary> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let (&min, &max) = (sorted.first()?, sorted.last()?);
        Some(Summary {
            count: sorted.len(),
            mean: sorted.iter().sum::<f64>() / sorted.len() as f64,
            min,
            p50: percentile(&sorted, 50.0),
            p95: percentile(&sorted, 95.0),
            p99: percentile(&sorted, 99.0),
            max,
        })
    }
}

/// The percentile `p` of sorted values, interpolated between the two nearest ranks; NaN without values.
pub fn percentile(sorted: &[f64], p: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else {
        return f64::NAN;
    };
    let rank = p.clamp(0.0, 100.0) / 100.0 * last as f64;
    let below = rank.floor() as usize;
    let above = (below + 1).min(last);
    sorted[below] + (sorted[above] - sorted[below]) * (rank - below as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn known_percentiles() {
        assert!(percentile(&[], 50.0).is_nan());
        assert_eq!(percentile(&[7.0], 99.0), 7.0);
        assert_eq!(percentile(&[1.0, 2.0, 3.0, 4.0], 50.0), 2.5);
        assert_eq!(percentile(&[1.0, 2.0, 3.0], 50.0), 2.0);
        let hundred: Vec<f64> = (0..=100).map(f64::from).collect();
        assert_eq!(percentile(&hundred, 95.0), 95.0);
        assert_eq!(percentile(&hundred, 0.0), 0.0);
        assert_eq!(percentile(&hundred, 100.0), 100.0);
    }

    #[test]
    fn a_summary_of_unsorted_samples() {
        let mut samples = Samples::default();
        assert_eq!(samples.summary(), None);
        for ms in [3, 1, 2] {
            samples.push(Duration::from_millis(ms));
        }
        let summary = samples.summary().unwrap();
        assert_eq!(
            (summary.count, summary.min, summary.p50, summary.max),
            (3, 1.0, 2.0, 3.0)
        );
        assert!((summary.mean - 2.0).abs() < 1e-9);
    }

    proptest! {
        #[test]
        fn percentiles_lie_within_and_grow(
            mut values in prop::collection::vec(0.0_f64..1e6, 1..50),
            p in 0.0_f64..100.0,
        ) {
            values.sort_by(f64::total_cmp);
            let value = percentile(&values, p);
            prop_assert!(value >= values[0] && value <= values[values.len() - 1]);
            prop_assert!(percentile(&values, 100.0) >= value);
        }
    }
}
