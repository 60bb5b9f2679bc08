//! What goes to the terminal: JSON and YAML from any CRI message, by its descriptor.
//!
//! The generated message types know nothing of JSON. The compiled descriptor does: a message is encoded
//! once, decoded as a dynamic one, and printed by the rules of protobuf's JSON mapping, which is what
//! crictl prints (camelCase names, 64-bit integers as strings, enums by name, defaults shown).
use std::io::{self, Write};
use std::sync::OnceLock;

use clap::ValueEnum;
use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage, SerializeOptions};
use serde_json::Value;

use crate::error::ClientError;

/// How a command prints what it found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Format {
    /// Columns for people.
    #[default]
    Table,
    /// The CRI response as JSON, by protobuf's JSON mapping.
    Json,
    /// The same as YAML.
    Yaml,
}

fn pool() -> Result<&'static DescriptorPool, ClientError> {
    static POOL: OnceLock<Option<DescriptorPool>> = OnceLock::new();
    POOL.get_or_init(|| DescriptorPool::decode(slipway_proto::CRI_DESCRIPTOR).ok())
        .as_ref()
        .ok_or_else(|| ClientError::Internal("the CRI descriptor can't be decoded".to_owned()))
}

/// Converts a message of package `runtime.v1` to JSON. `name` is its name within the package.
///
/// # Errors
/// [`ClientError::Internal`] when the package has no such message.
pub fn to_value<M: Message>(name: &str, message: &M) -> Result<Value, ClientError> {
    let internal = |e: String| ClientError::Internal(format!("{name} as JSON: {e}"));
    let descriptor = pool()?
        .get_message_by_name(&format!("runtime.v1.{name}"))
        .ok_or_else(|| internal("no such message".to_owned()))?;
    let dynamic = DynamicMessage::decode(descriptor, message.encode_to_vec().as_slice())
        .map_err(|e| internal(e.to_string()))?;
    let options = SerializeOptions::new().skip_default_fields(false);
    dynamic
        .serialize_with_options(serde_json::value::Serializer, &options)
        .map_err(|e| internal(e.to_string()))
}

/// Renders a JSON value as indented JSON or as YAML, with a newline at its end.
///
/// # Errors
/// [`ClientError::Internal`] when the value can't be written in that form.
pub fn render(value: &Value, format: Format) -> Result<String, ClientError> {
    match format {
        Format::Yaml => {
            serde_yaml_ng::to_string(value).map_err(|e| ClientError::Internal(e.to_string()))
        }
        Format::Json | Format::Table => serde_json::to_string_pretty(value)
            .map(|text| text + "\n")
            .map_err(|e| ClientError::Internal(e.to_string())),
    }
}

/// Writes text to standard output.
///
/// # Errors
/// [`ClientError::Output`], also when the reader has closed the pipe.
pub fn print(text: &str) -> Result<(), ClientError> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(ClientError::Output)
}

/// Converts the `info` of a verbose response: values that hold JSON become part of the tree.
pub fn info_value(info: &std::collections::HashMap<String, String>) -> Value {
    info.iter()
        .map(|(key, text)| {
            let value = serde_json::from_str(text).unwrap_or_else(|_| Value::from(text.as_str()));
            (key.clone(), value)
        })
        .collect()
}

/// Writes a time in nanoseconds since 1970 as RFC 3339 with nanoseconds, in UTC.
pub fn rfc3339(nanos: i64) -> String {
    chrono::DateTime::from_timestamp_nanos(nanos)
        .to_rfc3339_opts(chrono::SecondsFormat::Nanos, true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use slipway_proto::cri;

    #[test]
    fn json_follows_the_protobuf_mapping() {
        let message = cri::ListContainersResponse {
            containers: vec![cri::Container {
                id: "abc".into(),
                state: cri::ContainerState::ContainerRunning.into(),
                created_at: 1_700_000_000_000_000_001,
                labels: [("a".to_owned(), "b".to_owned())].into(),
                ..Default::default()
            }],
            ..Default::default()
        };
        let value = to_value("ListContainersResponse", &message).unwrap();
        let container = &value["containers"][0];
        assert_eq!(container["state"], "CONTAINER_RUNNING");
        assert_eq!(container["createdAt"], "1700000000000000001");
        assert_eq!(container["podSandboxId"], "");
        assert_eq!(container["labels"]["a"], "b");
        assert!(
            render(&value, Format::Yaml)
                .unwrap()
                .contains("podSandboxId: ''")
        );
        assert!(to_value("NoSuchMessage", &message).is_err());
    }

    #[test]
    fn info_is_nested_where_it_is_json() {
        let info = [
            ("info".to_owned(), r#"{"pid": 7}"#.to_owned()),
            ("note".to_owned(), "plain".to_owned()),
        ]
        .into();
        let value = info_value(&info);
        assert_eq!(value["info"]["pid"], 7);
        assert_eq!(value["note"], "plain");
    }

    #[test]
    fn times() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00.000000000Z");
        assert_eq!(
            rfc3339(1_700_000_000_000_000_001),
            "2023-11-14T22:13:20.000000001Z"
        );
    }
}
