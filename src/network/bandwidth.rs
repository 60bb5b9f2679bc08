//! A pod's bandwidth limits, which the kubelet passes as annotations with Kubernetes quantities.

use serde_json::{Value, json};
use std::collections::HashMap;
use std::hash::BuildHasher;
use thiserror::Error;

/// The annotation that limits what comes in.
pub const INGRESS_ANNOTATION: &str = "kubernetes.io/ingress-bandwidth";
/// The annotation that limits what goes out.
pub const EGRESS_ANNOTATION: &str = "kubernetes.io/egress-bandwidth";

/// Kubernetes' own bounds: 1k to 1P bits per second.
const LOWEST: u64 = 1_000;
const HIGHEST: u64 = 1_000_000_000_000_000;
/// In bits. No limit of its own, and what the bandwidth plugin still takes.
const BURST: u64 = u32::MAX as u64;
/// Longer numbers don't fit 64 bits in any unit.
const MAX_LENGTH: usize = 64;

/// Why a limit can't be used.
#[derive(Debug, Error, PartialEq, Eq)]
#[allow(missing_docs)] // The messages say it.
pub enum BandwidthError {
    #[error(
        "{what} {text:?} is not a quantity: write a number with k, M, G, T, P, Ki, Mi, Gi, Ti or Pi, such as 10M"
    )]
    Quantity { what: String, text: String },
    #[error("{what} {text:?} is out of range: it must be from 1k to 1P bits per second")]
    Range { what: String, text: String },
}

/// Limits in bits per second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bandwidth {
    /// Into the pod.
    pub ingress: Option<u64>,
    /// Out of the pod.
    pub egress: Option<u64>,
}

impl Bandwidth {
    /// The limits that a pod's annotations set; `None` when they set none.
    ///
    /// # Errors
    ///
    /// When an annotation is not a quantity, or outside 1k to 1P.
    pub fn from_annotations<S: BuildHasher>(
        annotations: &HashMap<String, String, S>,
    ) -> Result<Option<Self>, BandwidthError> {
        let limit = |what: &str| -> Result<Option<u64>, BandwidthError> {
            let Some(text) = annotations.get(what) else {
                return Ok(None);
            };
            let shown = || (what.to_owned(), text.chars().take(MAX_LENGTH).collect());
            let bits = quantity(text).ok_or_else(|| {
                let (what, text) = shown();
                BandwidthError::Quantity { what, text }
            })?;
            if (LOWEST..=HIGHEST).contains(&bits) {
                return Ok(Some(bits));
            }
            let (what, text) = shown();
            Err(BandwidthError::Range { what, text })
        };
        let found = Self {
            ingress: limit(INGRESS_ANNOTATION)?,
            egress: limit(EGRESS_ANNOTATION)?,
        };
        Ok((found != Self::default()).then_some(found))
    }

    /// The `bandwidth` capability's value.
    pub(crate) fn to_json(self) -> Value {
        let mut json = json!({});
        if let Some(rate) = self.ingress {
            json["ingressRate"] = rate.into();
            json["ingressBurst"] = BURST.into();
        }
        if let Some(rate) = self.egress {
            json["egressRate"] = rate.into();
            json["egressBurst"] = BURST.into();
        }
        json
    }
}

/// The value of a Kubernetes quantity, rounded up to a whole number. Absurdly large ones saturate;
/// negative ones are refused.
fn quantity(text: &str) -> Option<u64> {
    if text.len() > MAX_LENGTH {
        return None;
    }
    let text = text.strip_prefix('+').unwrap_or(text);
    let end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
        return None;
    }
    let (binary, exponent) = scale(suffix)?;
    let digits: String = [whole, fraction].concat();
    let digits = digits.trim_start_matches('0');
    if digits.is_empty() {
        return Some(0);
    }
    // digits × 10^power × 2^binary, where 38 digits fill u128.
    let power = exponent - i64::try_from(fraction.len()).ok()?;
    let mut value: u128 = match digits.parse() {
        Ok(value) => value,
        Err(_) if power >= 0 => return Some(u64::MAX),
        Err(_) => return None,
    };
    value = match value.checked_mul(1u128 << binary) {
        Some(value) => value,
        None => return Some(u64::MAX),
    };
    let factor = 10u128.checked_pow(u32::try_from(power.unsigned_abs()).ok()?);
    let value = match (factor, power < 0) {
        (Some(factor), true) => value.div_ceil(factor),
        (None, true) => 1,
        (Some(factor), false) => value.saturating_mul(factor),
        (None, false) => u128::MAX,
    };
    Some(u64::try_from(value).unwrap_or(u64::MAX))
}

/// Powers of two and of ten.
fn scale(suffix: &str) -> Option<(u32, i64)> {
    Some(match suffix {
        "" => (0, 0),
        "n" => (0, -9),
        "u" => (0, -6),
        "m" => (0, -3),
        "k" => (0, 3),
        "M" => (0, 6),
        "G" => (0, 9),
        "T" => (0, 12),
        "P" => (0, 15),
        "E" => (0, 18),
        "Ki" => (10, 0),
        "Mi" => (20, 0),
        "Gi" => (30, 0),
        "Ti" => (40, 0),
        "Pi" => (50, 0),
        "Ei" => (60, 0),
        _ => {
            let exponent = suffix.strip_prefix(['e', 'E'])?;
            let digits = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
            if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
                return None;
            }
            (0, exponent.parse::<i16>().ok()?.into())
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn quantities_are_read_as_kubernetes_reads_them() {
        for (text, value) in [
            ("10M", 10_000_000),
            ("1Gi", 1 << 30),
            ("1.5M", 1_500_000),
            ("0.5Ki", 512),
            (".5k", 500),
            ("5.", 5),
            ("+7", 7),
            ("100m", 1),
            ("1100m", 2),
            ("1e3", 1000),
            ("1E3", 1000),
            ("1E", 1_000_000_000_000_000_000),
            ("12e-1", 2),
            ("0", 0),
            ("000.000", 0),
            ("1n", 1),
            ("99999E", u64::MAX),
            ("1e400", u64::MAX),
            ("1e-400", 1),
        ] {
            assert_eq!(quantity(text), Some(value), "{text}");
        }
        for bad in [
            "", "M", ".", "1.2.3", "-1", "1 M", "1m1", "1MB", "1e", "1e+", "1e1.5", "١", "0x1",
        ] {
            assert_eq!(quantity(bad), None, "{bad}");
        }
    }

    #[test]
    fn annotations_become_limits_within_bounds() {
        let map = |pairs: &[(&str, &str)]| -> HashMap<String, String> {
            pairs
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect()
        };
        assert_eq!(Bandwidth::from_annotations(&map(&[("x", "1")])), Ok(None));
        let both = map(&[(INGRESS_ANNOTATION, "10M"), (EGRESS_ANNOTATION, "1Gi")]);
        let limits = Bandwidth::from_annotations(&both).unwrap().unwrap();
        assert_eq!(
            limits,
            Bandwidth {
                ingress: Some(10_000_000),
                egress: Some(1 << 30)
            }
        );
        assert_eq!(limits.to_json()["ingressRate"], 10_000_000);
        assert_eq!(limits.to_json()["egressBurst"], u32::MAX);
        for bad in ["999", "0", "2P", "-5M", "fast"] {
            let error = Bandwidth::from_annotations(&map(&[(EGRESS_ANNOTATION, bad)])).unwrap_err();
            assert!(error.to_string().contains(EGRESS_ANNOTATION), "{error}");
        }
    }

    proptest! {
        #[test]
        fn no_text_panics(text in "\\PC{0,80}") { let _ = quantity(&text); }

        #[test]
        fn nothing_like_a_quantity_panics(text in "[0-9.+-]{0,50}[a-zA-Z]{0,2}[0-9+-]{0,6}") {
            let _ = quantity(&text);
        }

        #[test]
        fn whole_numbers_are_exact(n in any::<u32>(), power in 0u32..4) {
            let suffix = ["", "k", "M", "G"][power as usize];
            prop_assert_eq!(quantity(&format!("{n}{suffix}")), Some(u64::from(n) * 1000u64.pow(power)));
        }
    }
}
