//! Where the time of a pod's start went: each RPC as the client saw it, and the phases that the daemon
//! tells in its verbose status.
//!
//! The daemon's phases stand under `phases`, in its own right or inside a JSON value of `info`: an
//! object `{"name": µs}` or a list of `{"name": "…", "micros": µs}` in order.
use std::collections::HashMap;
use std::future::Future;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::quantity;
use crate::table::Table;

/// The durations of a start, in order.
#[derive(Debug, Default)]
pub struct Timings {
    steps: Vec<Step>,
}

#[derive(Debug)]
struct Step {
    name: String,
    took: Duration,
    phases: Vec<(String, f64)>,
}

impl Timings {
    /// Awaits a call and notes how long it took.
    pub async fn measure<T>(&mut self, name: &str, call: impl Future<Output = T>) -> T {
        let started = Instant::now();
        let result = call.await;
        let took = started.elapsed();
        self.steps.push(Step {
            name: name.to_owned(),
            took,
            phases: Vec::new(),
        });
        result
    }

    /// Adds what the daemon tells about a step. Phases whose name begins with a step's name and a dot
    /// go to that step, all others to `step`.
    pub fn add_phases(&mut self, step: &str, info: &HashMap<String, String>) {
        for (name, micros) in phases(info) {
            let (target, name) = match name.split_once('.') {
                Some((target, rest)) if self.steps.iter().any(|s| s.name == target) => {
                    (target.to_owned(), rest.to_owned())
                }
                _ => (step.to_owned(), name),
            };
            if let Some(step) = self.steps.iter_mut().find(|s| s.name == target) {
                step.phases.push((name, micros));
            }
        }
    }

    /// A table: steps, their phases indented below them, and the total.
    pub fn render(&self) -> String {
        let mut table = Table::new(&["STEP", "MS"]);
        let ms = |micros: f64| format!("{:8.3}", micros / 1000.0);
        for step in &self.steps {
            table.row([step.name.clone(), ms(step.took.as_secs_f64() * 1e6)]);
            for (name, micros) in &step.phases {
                table.row([format!("  {name}"), ms(*micros)]);
            }
        }
        let total: Duration = self.steps.iter().map(|step| step.took).sum();
        table.row(["total".to_owned(), ms(total.as_secs_f64() * 1e6)]);
        table.render()
    }
}

/// The phases of a verbose status with their durations in µs.
pub fn phases(info: &HashMap<String, String>) -> Vec<(String, f64)> {
    let parse = |text: &String| serde_json::from_str::<Value>(text).ok();
    let own = info.get("phases").and_then(parse);
    let nested = || {
        info.values()
            .filter_map(parse)
            .find_map(|v| v.get("phases").cloned())
    };
    let micros = |value: &Value| match value {
        Value::Number(number) => number.as_f64(),
        Value::String(text) => quantity::parse_duration(text)
            .ok()
            .map(|duration| duration.as_secs_f64() * 1e6),
        _ => None,
    };
    match own.or_else(nested) {
        Some(Value::Object(map)) => map
            .iter()
            .filter_map(|(name, v)| Some((name.clone(), micros(v)?)))
            .collect(),
        Some(Value::Array(list)) => list
            .iter()
            .filter_map(|item| {
                let took = item.get("micros").or_else(|| item.get("us"))?;
                Some((item.get("name")?.as_str()?.to_owned(), micros(took)?))
            })
            .collect(),
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_in_all_forms() {
        let info = |key: &str, text: &str| [(key.to_owned(), text.to_owned())].into();
        let expected = vec![("keeper".to_owned(), 400.0), ("cni".to_owned(), 20.5)];
        let list =
            r#"[{"name": "keeper", "micros": 400}, {"name": "cni", "us": 20.5}, {"name": 1}]"#;
        assert_eq!(phases(&info("phases", list)), expected);
        assert_eq!(
            phases(&info("info", &format!(r#"{{"phases": {list}}}"#))),
            expected
        );
        let mut object = phases(&info(
            "phases",
            r#"{"keeper": 400, "cni": 20.5, "x": null}"#,
        ));
        object.sort_by(|a, b| b.1.total_cmp(&a.1));
        assert_eq!(object, expected);
        assert_eq!(phases(&info("phases", "rubbish")), vec![]);
        assert_eq!(phases(&info("info", "{}")), vec![]);
    }

    #[tokio::test]
    async fn steps_and_phases_are_shown() {
        let mut timings = Timings::default();
        assert_eq!(timings.measure("RunPodSandbox", async { 7 }).await, 7);
        timings.measure("StartContainer", async {}).await;
        let text = r#"[{"name": "keeper", "us": 1500}, {"name": "StartContainer.exec", "us": 2}]"#;
        timings.add_phases(
            "RunPodSandbox",
            &[("phases".to_owned(), text.to_owned())].into(),
        );
        let text = timings.render();
        let names: Vec<_> = text
            .lines()
            .map(|l| l.split_whitespace().next().unwrap())
            .collect();
        assert_eq!(
            names,
            [
                "STEP",
                "RunPodSandbox",
                "keeper",
                "StartContainer",
                "exec",
                "total"
            ]
        );
        assert!(text.contains("1.500"), "{text}");
    }
}
