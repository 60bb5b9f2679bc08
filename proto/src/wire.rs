//! Encoding field by field: what is at hand as references goes into a message's bytes without being cloned first, and
//! what is encoded already is put in as it is.
//!
//! Fields of a message may come in any order, and a message in parts; so the bytes of some fields followed by those of
//! the others are the message.

use std::collections::HashMap;

use prost::Message;
use prost::encoding::{self, WireType};

/// A `string` field; nothing for the empty one, which is the default.
pub fn string(tag: u32, value: &String, into: &mut Vec<u8>) {
    if !value.is_empty() {
        encoding::string::encode(tag, value, into);
    }
}

/// A `map<string, string>` field.
pub fn strings(tag: u32, map: &HashMap<String, String>, into: &mut Vec<u8>) {
    encoding::hash_map::encode(
        encoding::string::encode,
        encoding::string::encoded_len,
        encoding::string::encode,
        encoding::string::encoded_len,
        tag,
        map,
        into,
    );
}

/// A field that is a message; nothing for `None`.
pub fn message(tag: u32, value: Option<&impl Message>, into: &mut Vec<u8>) {
    if let Some(value) = value {
        encoding::message::encode(tag, value, into);
    }
}

/// A field that is a message, whose own fields `fields` appends.
pub fn nested(tag: u32, into: &mut Vec<u8>, fields: impl FnOnce(&mut Vec<u8>)) {
    let begin = into.len();
    fields(into);
    let length = into.len() - begin;
    // The length stands before what it is the length of, and is known now.
    let mut head = [0; 16];
    let mut rest = &mut head[..];
    encoding::encode_key(tag, WireType::LengthDelimited, &mut rest);
    encoding::encode_varint(length as u64, &mut rest);
    let room = 16 - rest.len();
    into.resize(begin + length + room, 0);
    into.copy_within(begin..begin + length, begin + room);
    into[begin..begin + room].copy_from_slice(&head[..room]);
}

/// Declares the answer of a List call, which is one repeated field with tag 1. Its objects may be there as objects, or
/// encoded as fields of the answer; a client gets objects.
macro_rules! list {
    ($(#[$doc:meta])* $name:ident { $field:ident: $object:ty }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Default, PartialEq)]
        pub struct $name {
            /// The objects.
            pub $field: Vec<$object>,
            /// More of them, each encoded as a field of this message with tag 1.
            pub encoded: Vec<u8>,
        }

        impl Message for $name {
            fn encode_raw(&self, buf: &mut impl prost::bytes::BufMut) {
                buf.put_slice(&self.encoded);
                encoding::message::encode_repeated(1, &self.$field, buf);
            }

            fn merge_field(
                &mut self,
                tag: u32,
                wire_type: WireType,
                buf: &mut impl prost::bytes::Buf,
                ctx: encoding::DecodeContext,
            ) -> Result<(), prost::DecodeError> {
                match tag {
                    1 => encoding::message::merge_repeated(wire_type, &mut self.$field, buf, ctx),
                    _ => encoding::skip_field(wire_type, tag, buf, ctx),
                }
            }

            fn encoded_len(&self) -> usize {
                self.encoded.len() + encoding::message::encoded_len_repeated(1, &self.$field)
            }

            fn clear(&mut self) {
                *self = Self::default();
            }
        }
    };
}

list! {
    /// The answer of ListContainers.
    ListContainersResponse { containers: crate::cri::Container }
}
list! {
    /// The answer of ListContainerStats.
    ListContainerStatsResponse { stats: crate::cri::ContainerStats }
}
list! {
    /// The answer of ListPodSandboxStats.
    ListPodSandboxStatsResponse { stats: crate::cri::PodSandboxStats }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cri;

    #[test]
    fn what_is_encoded_field_by_field_is_the_message() {
        let labels: HashMap<_, _> = (0..40)
            .map(|n| (format!("key-{n}"), format!("value-{n}")))
            .collect();
        let metadata = cri::ContainerMetadata {
            name: "n".to_owned(),
            attempt: 7,
        };
        // Short, and long enough that its length takes more than one byte.
        for labels in [HashMap::new(), labels] {
            let attributes = cri::ContainerAttributes {
                id: "c1".to_owned(),
                metadata: Some(metadata.clone()),
                labels: labels.clone(),
                annotations: HashMap::new(),
            };
            let swap = Some(cri::SwapUsage {
                timestamp: 5,
                ..Default::default()
            });
            let mut encoded = vec![];
            nested(1, &mut encoded, |out| {
                message(5, swap.as_ref(), out);
                message(6, None::<&cri::IoUsage>, out);
                nested(1, out, |out| {
                    string(1, &attributes.id, out);
                    message(2, attributes.metadata.as_ref(), out);
                    strings(3, &labels, out);
                    strings(4, &attributes.annotations, out);
                });
            });
            let stats = cri::ContainerStats {
                attributes: Some(attributes),
                swap,
                ..Default::default()
            };
            let both = ListContainerStatsResponse {
                stats: vec![stats.clone()],
                encoded,
            };
            let bytes = both.encode_to_vec();
            assert_eq!(bytes.len(), both.encoded_len());
            let told = ListContainerStatsResponse::decode(&bytes[..]).unwrap();
            assert_eq!(told.stats, [stats.clone(), stats]);
            assert!(told.encoded.is_empty());
        }
        let mut nothing = vec![];
        string(1, &String::new(), &mut nothing);
        assert!(nothing.is_empty());
    }

    #[test]
    fn fields_of_later_versions_are_passed_over() {
        let mut bytes = vec![];
        string(9, &"new".to_owned(), &mut bytes);
        message(1, Some(&cri::Container::default()), &mut bytes);
        let told = ListContainersResponse::decode(&bytes[..]).unwrap();
        assert_eq!(told.containers, [cri::Container::default()]);
        assert!(ListContainersResponse::decode(&[10, 5, 1][..]).is_err());
    }
}
