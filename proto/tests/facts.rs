//! The compiled descriptor against the published facts of CRI v1: every service, message, field and
//! enum, by name, number, type and label.

#![allow(clippy::expect_used)]

use std::collections::BTreeSet;

use prost::Message as _;
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, EnumDescriptorProto, FieldDescriptorProto, FileDescriptorSet};
use serde_json::Value;

fn facts() -> Value {
    serde_json::from_str(include_str!("data/cri-v1-facts.json")).expect("the facts are JSON")
}

fn file() -> prost_types::FileDescriptorProto {
    let set = FileDescriptorSet::decode(slipway_proto::CRI_DESCRIPTOR).expect("a descriptor set");
    set.file
        .into_iter()
        .find(|f| f.package() == "runtime.v1")
        .expect("package runtime.v1")
}

/// The last component of a fully qualified type name.
fn short(name: &str) -> String {
    name.trim_start_matches(".runtime.v1.").to_owned()
}

fn type_name(field: &FieldDescriptorProto) -> String {
    match field.r#type() {
        Type::Message | Type::Enum => short(field.type_name()),
        Type::String => "string".into(),
        Type::Bytes => "bytes".into(),
        Type::Bool => "bool".into(),
        Type::Int32 => "int32".into(),
        Type::Int64 => "int64".into(),
        Type::Uint32 => "uint32".into(),
        Type::Uint64 => "uint64".into(),
        Type::Double => "double".into(),
        Type::Float => "float".into(),
        other => format!("{other:?}"),
    }
}

/// One line per field: what the wire and the generated code depend on.
fn described_fields(message: &DescriptorProto) -> BTreeSet<String> {
    message
        .field
        .iter()
        .map(|field| {
            let entry = message
                .nested_type
                .iter()
                .find(|n| field.type_name().ends_with(&format!(".{}", n.name())))
                .filter(|n| n.options.as_ref().is_some_and(|o| o.map_entry()));
            let (label, ty) = match entry {
                Some(entry) => (
                    "map",
                    format!(
                        "{}->{}",
                        type_name(&entry.field[0]),
                        type_name(&entry.field[1])
                    ),
                ),
                None if field.label() == Label::Repeated => ("repeated", type_name(field)),
                None => ("singular", type_name(field)),
            };
            let options = field.options.as_ref();
            format!(
                "{} = {} {label} {ty} deprecated={}",
                field.name(),
                field.number(),
                options.is_some_and(|o| o.deprecated()),
            )
        })
        .collect()
}

fn expected_fields(message: &Value) -> BTreeSet<String> {
    message["fields"]
        .as_array()
        .expect("fields")
        .iter()
        .map(|f| {
            let text = |k: &str| f[k].as_str().unwrap_or_default();
            let ty = match text("label") {
                "map" => format!("{}->{}", text("key"), text("type")),
                _ => text("type").to_owned(),
            };
            format!(
                "{} = {} {} {ty} deprecated={}",
                text("name"),
                f["number"],
                text("label"),
                f["deprecated"].as_bool().unwrap_or(false),
            )
        })
        .collect()
}

#[test]
fn messages_match_the_facts() {
    let (facts, file) = (facts(), file());
    let expected = facts["messages"].as_object().expect("messages");
    assert_eq!(expected.len(), 175);
    let names: BTreeSet<_> = file.message_type.iter().map(|m| m.name()).collect();
    assert_eq!(names, expected.keys().map(String::as_str).collect());
    for message in &file.message_type {
        assert_eq!(
            described_fields(message),
            expected_fields(&expected[message.name()]),
            "fields of {}",
            message.name()
        );
    }
}

#[test]
fn enums_match_the_facts() {
    let (facts, file) = (facts(), file());
    let expected = facts["enums"].as_object().expect("enums");
    let mut found: Vec<(String, &EnumDescriptorProto)> = Vec::new();
    found.extend(file.enum_type.iter().map(|e| (e.name().to_owned(), e)));
    for message in &file.message_type {
        let nested = message.enum_type.iter();
        found.extend(nested.map(|e| (format!("{}.{}", message.name(), e.name()), e)));
    }
    assert_eq!(found.len(), 11);
    assert_eq!(found.len(), expected.len());
    for (name, described) in found {
        let values: BTreeSet<_> = described
            .value
            .iter()
            .map(|v| (v.name().to_owned(), i64::from(v.number())))
            .collect();
        let wanted: BTreeSet<_> = expected[&name]["values"]
            .as_array()
            .expect("values")
            .iter()
            .map(|v| {
                (
                    v["name"].as_str().expect("name").to_owned(),
                    v["number"].as_i64().expect("number"),
                )
            })
            .collect();
        assert_eq!(values, wanted, "values of {name}");
    }
}

#[test]
fn services_match_the_facts() {
    let (facts, file) = (facts(), file());
    let mut paths = BTreeSet::new();
    for service in &file.service {
        let expected = facts["services"][service.name()]
            .as_array()
            .expect("the service is known");
        assert_eq!(
            service.method.len(),
            expected.len(),
            "RPCs of {}",
            service.name()
        );
        for method in &service.method {
            let wanted = expected
                .iter()
                .find(|m| m["name"] == method.name())
                .unwrap_or_else(|| panic!("{} is no CRI call", method.name()));
            assert_eq!(
                short(method.input_type()),
                wanted["request"],
                "{}",
                method.name()
            );
            assert_eq!(
                short(method.output_type()),
                wanted["response"],
                "{}",
                method.name()
            );
            assert_eq!(
                method.client_streaming(),
                wanted["client_streaming"],
                "{}",
                method.name()
            );
            assert_eq!(
                method.server_streaming(),
                wanted["server_streaming"],
                "{}",
                method.name()
            );
            paths.insert(format!(
                "/{}.{}/{}",
                file.package(),
                service.name(),
                method.name()
            ));
        }
    }
    let wanted: BTreeSet<_> = facts["grpc_paths"]
        .as_array()
        .expect("paths")
        .iter()
        .map(|p| p.as_str().expect("path").to_owned())
        .collect();
    assert_eq!(paths.len(), 43);
    assert_eq!(paths, wanted);
}

#[test]
fn secrets_are_not_printed() {
    // Every field that the facts mark as secret belongs to the message whose Debug we write ourselves.
    let facts = facts();
    for (name, message) in facts["messages"].as_object().expect("messages") {
        for field in message["fields"].as_array().expect("fields") {
            if field["debug_redact"] == true {
                assert_eq!(name, "AuthConfig", "{field}");
            }
        }
    }
    let auth = slipway_proto::cri::AuthConfig {
        username: "user".into(),
        password: "hunter2".into(),
        auth: "aHVudGVyMg==".into(),
        identity_token: "identity-secret".into(),
        registry_token: "registry-secret".into(),
        ..Default::default()
    };
    let request = slipway_proto::cri::PullImageRequest {
        auth: Some(auth),
        ..Default::default()
    };
    let printed = format!("{request:?}");
    assert!(printed.contains("user"));
    for secret in [
        "hunter2",
        "aHVudGVyMg==",
        "identity-secret",
        "registry-secret",
    ] {
        assert!(!printed.contains(secret), "{printed}");
    }
}
