//! The events that a plugin may hear of.

use slipway_proto::nri::Event;

/// A set of events, as [`ConfigureResponse`](slipway_proto::nri::ConfigureResponse) has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Events(i32);

/// All there are.
const EVERY: i32 = (1 << Event::ValidateContainerAdjustment as i32) - 1;

impl Events {
    /// None.
    pub const NONE: Self = Self(0);

    /// What a plugin subscribed to; nothing said is everything.
    ///
    /// # Errors
    /// The bits that stand for no event.
    pub fn subscribed(bits: i32) -> Result<Self, i32> {
        match bits {
            0 => Ok(Self(EVERY)),
            bits if bits & !EVERY != 0 => Err(bits & !EVERY),
            bits => Ok(Self(bits)),
        }
    }

    /// Whether this event is among them.
    pub fn has(self, event: Event) -> bool {
        event != Event::Unknown && self.0 & (1 << (event as i32 - 1)) != 0
    }

    /// Both together.
    #[must_use]
    pub fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// The method that an event is called by.
pub(crate) fn method(event: Event) -> &'static str {
    match event {
        Event::Unknown => "Unknown",
        Event::RunPodSandbox => "RunPodSandbox",
        Event::StopPodSandbox => "StopPodSandbox",
        Event::RemovePodSandbox => "RemovePodSandbox",
        Event::CreateContainer => "CreateContainer",
        Event::PostCreateContainer => "PostCreateContainer",
        Event::StartContainer => "StartContainer",
        Event::PostStartContainer => "PostStartContainer",
        Event::UpdateContainer => "UpdateContainer",
        Event::PostUpdateContainer => "PostUpdateContainer",
        Event::StopContainer => "StopContainer",
        Event::RemoveContainer => "RemoveContainer",
        Event::UpdatePodSandbox => "UpdatePodSandbox",
        Event::PostUpdatePodSandbox => "PostUpdatePodSandbox",
        Event::ValidateContainerAdjustment => "ValidateContainerAdjustment",
    }
}

/// Whether plugins of older versions hear of this through StateChange.
pub(crate) fn has_fallback(event: Event) -> bool {
    !matches!(
        event,
        Event::Unknown
            | Event::CreateContainer
            | Event::UpdateContainer
            | Event::StopContainer
            | Event::UpdatePodSandbox
            | Event::ValidateContainerAdjustment
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subscriptions() {
        assert_eq!(EVERY, 0x3fff);
        let all = Events::subscribed(0).unwrap();
        assert!(all.has(Event::RunPodSandbox) && all.has(Event::ValidateContainerAdjustment));
        let one = Events::subscribed(1 << 3).unwrap();
        assert!(one.has(Event::CreateContainer) && !one.has(Event::StartContainer));
        assert!(!all.has(Event::Unknown));
        assert_eq!(Events::subscribed(1 << 14 | 1), Err(1 << 14));
        assert!(Events::NONE.with(one).has(Event::CreateContainer));
    }
}
