//! Stop signals.

use crate::error::{Result, SpecError};
use slipway_proto::cri;

const SIGTERM: i32 = 15;
const SIGRTMIN: i32 = 34;
const SIGRTMAX: i32 = 64;

/// Names without `SIG`, with their numbers on the architectures that Linux nodes have (signal(7)).
const NAMES: [(&str, i32); 34] = [
    ("ABRT", 6),
    ("ALRM", 14),
    ("BUS", 7),
    ("CHLD", 17),
    ("CLD", 17),
    ("CONT", 18),
    ("FPE", 8),
    ("HUP", 1),
    ("ILL", 4),
    ("INT", 2),
    ("IO", 29),
    ("IOT", 6),
    ("KILL", 9),
    ("PIPE", 13),
    ("POLL", 29),
    ("PROF", 27),
    ("PWR", 30),
    ("QUIT", 3),
    ("SEGV", 11),
    ("STKFLT", 16),
    ("STOP", 19),
    ("SYS", 31),
    ("TERM", SIGTERM),
    ("TRAP", 5),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("USR1", 10),
    ("USR2", 12),
    ("VTALRM", 26),
    ("WINCH", 28),
    ("XCPU", 24),
    ("XFSZ", 25),
];

/// The signal that asks a container to stop: the request's, else the image's, else SIGTERM. An image's
/// signal that is none is passed over with a warning, for it has nothing to do with running it.
pub(crate) fn stop(requested: i32, image: Option<&str>, warnings: &mut Vec<String>) -> Result<i32> {
    let Ok(signal) = cri::Signal::try_from(requested) else {
        return Err(SpecError::invalid(
            "stop_signal",
            format!("there is no signal {requested}"),
        ));
    };
    if signal != cri::Signal::RuntimeDefault {
        let number = signal
            .as_str_name()
            .strip_prefix("SIGNAL_")
            .and_then(number);
        return number.ok_or_else(|| {
            SpecError::invalid(
                "stop_signal",
                format!("{} is not known here", signal.as_str_name()),
            )
        });
    }
    let Some(image) = image.filter(|name| !name.is_empty()) else {
        return Ok(SIGTERM);
    };
    Ok(number(image).unwrap_or_else(|| {
        let name = crate::error::quoted(image);
        warnings.push(format!(
            "the image's stop signal {name} is none; SIGTERM is used"
        ));
        SIGTERM
    }))
}

/// The number of `15`, `TERM`, `SIGTERM`, `SIGRTMIN+3`, `RTMAX-1`, or the CRI's `SIGRTMINPLUS3`.
fn number(name: &str) -> Option<i32> {
    if !name.is_empty() && name.bytes().all(|b| b.is_ascii_digit()) {
        return name.parse().ok().filter(|n| (1..=SIGRTMAX).contains(n));
    }
    let upper = name.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let offset = |text: &str, signs: [&str; 2]| -> Option<i32> {
        if text.is_empty() {
            return Some(0);
        }
        let digits = signs.iter().find_map(|sign| text.strip_prefix(sign))?;
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        digits.parse().ok().filter(|n| *n <= SIGRTMAX - SIGRTMIN)
    };
    if let Some(rest) = name.strip_prefix("RTMIN") {
        return Some(SIGRTMIN + offset(rest, ["+", "PLUS"])?);
    }
    if let Some(rest) = name.strip_prefix("RTMAX") {
        return Some(SIGRTMAX - offset(rest, ["-", "MINUS"])?);
    }
    NAMES
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, number)| *number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_signal_of_the_cri_has_its_number() {
        use cri::Signal as S;
        let none = &mut Vec::new();
        let cases = [
            (S::Sigabrt, 6),
            (S::Sigcld, 17),
            (S::Sighup, 1),
            (S::Sigint, 2),
            (S::Sigkill, 9),
            (S::Sigpoll, 29),
            (S::Sigterm, 15),
            (S::Sigusr1, 10),
            (S::Sigxfsz, 25),
            (S::Sigrtmin, 34),
            (S::Sigrtminplus15, 49),
            (S::Sigrtmaxminus14, 50),
            (S::Sigrtmaxminus1, 63),
            (S::Sigrtmax, 64),
        ];
        for (signal, number) in cases {
            assert_eq!(
                stop(signal.into(), Some("SIGHUP"), none),
                Ok(number),
                "{signal:?}"
            );
        }
        let mut last = 0;
        for value in 1..=65 {
            let number = stop(value, None, none).expect("known");
            assert!((1..=64).contains(&number));
            if value >= S::Sigrtmin.into() {
                assert!(number > last, "real-time signals go up");
            }
            last = number;
        }
        assert!(stop(66, None, none).is_err() && stop(-1, None, none).is_err());
        assert!(none.is_empty());
    }

    #[test]
    fn the_images_signal_is_second() {
        let mut warnings = Vec::new();
        let cases = [
            (None, 15),
            (Some(""), 15),
            (Some("SIGQUIT"), 3),
            (Some("quit"), 3),
            (Some("37"), 37),
            (Some("SIGRTMIN+3"), 37),
            (Some("RTMAX-2"), 62),
            (Some("SIGWINCH"), 28),
        ];
        for (image, number) in cases {
            assert_eq!(stop(0, image, &mut warnings), Ok(number), "{image:?}");
        }
        assert!(warnings.is_empty());
        for bad in [
            "SIGNOTHING",
            "0",
            "65",
            "-9",
            "RTMIN+",
            "RTMIN+31",
            "RTMIN++1",
            "٣",
            "99999999999",
        ] {
            assert_eq!(stop(0, Some(bad), &mut warnings), Ok(15), "{bad}");
            assert!(
                warnings.pop().is_some_and(|w| w.contains("stop signal")),
                "{bad}"
            );
        }
    }

    proptest! {
        #[test]
        fn a_number_is_a_signal(name in prop_oneof!["(SIG)?RTM(IN|AX)[-+]?[0-9]{0,4}", "\\PC*"]) {
            if let Some(number) = number(&name) {
                prop_assert!((1..=64).contains(&number));
            }
        }
    }
}
