//! What a shim tells by itself: the events service of containerd's, which a shim calls. It must be there: a shim
//! that can't get rid of its events waits for that, and then does nothing else any more.

use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::events::task::TaskOOM;
use containerd_shim_protos::protobuf::Message;

use crate::wire::{self, Inbox, Incoming};

/// What is of interest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The kernel's OOM killer struck in a container.
    Oom {
        /// The container.
        id: String,
    },
}

/// One connection of a shim's, from bytes to answers.
#[derive(Debug, Default)]
pub struct Receiver {
    inbox: Inbox,
}

impl Receiver {
    /// Takes what was read; what is to be written back, and what is of interest in it.
    ///
    /// # Errors
    /// What is wrong with it; the connection is of no use then.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<(Vec<u8>, Vec<Event>), String> {
        self.inbox.feed(bytes);
        let (mut answers, mut events) = (Vec::new(), Vec::new());
        while let Some(message) = self.inbox.next()? {
            if let Incoming::Request {
                stream,
                method,
                payload,
                ..
            } = message
            {
                // Whatever it is, there is nothing to say to it.
                answers.extend(wire::response(stream, Vec::new())?);
                if method == "Forward" {
                    events.extend(event(&payload));
                }
            }
        }
        Ok((answers, events))
    }
}

fn event(payload: &[u8]) -> Option<Event> {
    let request = ForwardRequest::parse_from_bytes(payload).ok()?;
    let envelope = request.envelope.into_option()?;
    if envelope.topic != "/tasks/oom" {
        return None;
    }
    let oom = TaskOOM::parse_from_bytes(&envelope.event.as_ref()?.value).ok()?;
    Some(Event::Oom {
        id: oom.container_id,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim_protos::protobuf::well_known_types::any::Any;
    use std::time::Duration;

    #[test]
    fn events_are_answered_and_kills_are_told() {
        let mut oom = TaskOOM::new();
        oom.container_id = "c1".into();
        let mut any = Any::new();
        any.value = oom.write_to_bytes().unwrap();
        let mut request = ForwardRequest::new();
        let envelope = request.envelope.mut_or_insert_default();
        envelope.topic = "/tasks/oom".into();
        envelope.event = Some(any).into();
        let payload = request.write_to_bytes().unwrap();
        let message = |stream, payload| {
            let service = "containerd.services.events.ttrpc.v1.Events";
            wire::request(stream, service, "Forward", payload, Duration::ZERO).unwrap()
        };
        let mut bytes = message(1, payload);
        bytes.extend(message(3, b"nonsense".to_vec()));
        let mut receiver = Receiver::default();
        let (answers, events) = receiver.feed(&bytes).unwrap();
        assert_eq!(events, [Event::Oom { id: "c1".into() }]);
        let mut inbox = Inbox::default();
        inbox.feed(&answers);
        for stream in [1, 3] {
            let answer = inbox.next().unwrap();
            assert_eq!(
                answer,
                Some(Incoming::Response {
                    stream,
                    result: Ok(Vec::new())
                })
            );
        }
        assert!(receiver.feed(&[0xff; 10]).is_err());
    }
}
