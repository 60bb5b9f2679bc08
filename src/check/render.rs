//! The report as text.

use crate::finding::{Finding, Report, Status};
use serde::Serialize;

/// Narrower than this, text is not wrapped any further.
const NARROW: usize = 60;
/// Wider lines are hard to read.
const WIDE: usize = 120;
const GAP: usize = 2;

/// For people: one paragraph per finding, aligned, wrapped at `width` columns.
pub(crate) fn table(report: &Report, width: usize) -> String {
    let width = width.clamp(NARROW, WIDE);
    let findings = &report.findings;
    let longest = findings.iter().map(|f| f.what.chars().count()).max();
    let name = longest.unwrap_or(0).clamp("CHECK".len(), NARROW / 2);
    let status = "STATUS".len();
    let indent = status + GAP + name + GAP;
    let mut text = line("STATUS", "CHECK", "FOUND", status, name);
    for finding in findings {
        let mut lines = wrapped(&clean(&finding.found), width - indent);
        for (label, more) in [("cost: ", &finding.cost), ("fix:  ", &finding.fix)] {
            let Some(more) = more else { continue };
            let room = width - indent - label.len();
            for (n, part) in wrapped(&clean(more), room).into_iter().enumerate() {
                let label = if n == 0 { label } else { "      " };
                lines.push(format!("{label}{part}"));
            }
        }
        for (n, part) in lines.iter().enumerate() {
            text += &match n {
                0 => line(finding.status.as_str(), &finding.what, part, status, name),
                _ => line("", "", part, status, name),
            };
        }
    }
    let counts = [Status::Ok, Status::Info, Status::Warn, Status::Fail]
        .map(|s| format!("{} {}", report.count(s), s.as_str()));
    text += &format!("\n{}\n", counts.join(", "));
    text
}

/// What was found may hold other programs' words.
fn clean(text: &str) -> String {
    text.replace(char::is_control, " ")
}

fn line(status: &str, what: &str, found: &str, status_width: usize, name: usize) -> String {
    let text = format!("{status:<status_width$}  {what:<name$}  {found}");
    format!("{}\n", text.trim_end())
}

/// Breaks at blanks; a word that is too long stays whole, for paths must be copyable.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = Vec::new();
    let mut current = String::new();
    for word in text.split_whitespace() {
        let length = current.chars().count();
        if length > 0 && length + 1 + word.chars().count() > width {
            lines.push(std::mem::take(&mut current));
        }
        if !current.is_empty() {
            current.push(' ');
        }
        current.push_str(word);
    }
    lines.push(current);
    lines
}

/// For programs.
pub(crate) fn json(report: &Report) -> String {
    #[derive(Serialize)]
    struct Shown<'a> {
        ok: bool,
        version: &'static str,
        findings: &'a [Finding],
    }
    let shown = Shown {
        ok: report.ok(),
        version: env!("CARGO_PKG_VERSION"),
        findings: &report.findings,
    };
    // Strings, a bool and a list of them: there is nothing in it that has no JSON.
    let mut text = serde_json::to_string_pretty(&shown).unwrap_or_default();
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let findings = vec![
            Finding::ok("a", "first", "well"),
            Finding::fail("b", "the second one", "a b c ".repeat(20) + "\u{1b}[31m\n")
                .cost("much")
                .fix("x ".repeat(60)),
        ];
        Report { findings }
    }

    #[test]
    fn a_table_is_aligned_and_wrapped() {
        let text = table(&report(), 64);
        assert!(text.lines().all(|l| l.chars().count() <= 64), "{text}");
        assert!(text.lines().all(|l| l == l.trim_end()), "{text}");
        assert!(!text.contains('\u{1b}'));
        assert!(text.starts_with("STATUS  CHECK           FOUND\nok      first           well\n"));
        assert!(
            text.contains("\n                        cost: much\n"),
            "{text}"
        );
        assert!(text.ends_with("\n1 ok, 0 info, 0 warn, 1 fail\n"));
    }

    #[test]
    fn json_has_every_field() {
        let value: serde_json::Value = serde_json::from_str(&json(&report())).unwrap();
        assert_eq!(value["ok"], false);
        assert_eq!(value["findings"][0]["status"], "ok");
        assert_eq!(value["findings"][0].get("cost"), None);
        assert_eq!(value["findings"][1]["cost"], "much");
    }

    proptest::proptest! {
        #[test]
        fn no_width_and_no_text_panics(width: usize, text: String) {
            let report = Report { findings: vec![Finding::warn("x", &text, text.clone()).cost(text)] };
            let _ = table(&report, width);
        }
    }
}
