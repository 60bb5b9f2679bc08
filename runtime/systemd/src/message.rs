//! D-Bus messages in their wire format (D-Bus Specification, "Message Protocol"), as far as systemd's
//! manager interface needs it: little-endian only, and of the types only those that are used.

/// Longer ones are an error: nothing that systemd tells a manager of scopes comes near it.
pub(crate) const LONGEST: usize = 16 << 20;

/// A property's value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// `b`
    Bool(bool),
    /// `t`
    U64(u64),
    /// `s`
    Str(String),
    /// `au`
    U32s(Vec<u32>),
    /// `ay`
    Bytes(Vec<u8>),
}

impl Value {
    fn signature(&self) -> &'static str {
        match self {
            Self::Bool(_) => "b",
            Self::U64(_) => "t",
            Self::Str(_) => "s",
            Self::U32s(_) => "au",
            Self::Bytes(_) => "ay",
        }
    }
}

/// Builds a body, or anything else that begins at a multiple of eight.
#[derive(Debug, Default)]
pub(crate) struct Encoder {
    bytes: Vec<u8>,
}

impl Encoder {
    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    pub(crate) fn align(&mut self, to: usize) {
        self.bytes.resize(self.bytes.len().next_multiple_of(to), 0);
    }

    pub(crate) fn byte(&mut self, value: u8) {
        self.bytes.push(value);
    }

    pub(crate) fn u32(&mut self, value: u32) {
        self.align(4);
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.align(8);
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    pub(crate) fn str(&mut self, value: &str) {
        self.u32(value.len() as u32);
        self.bytes.extend_from_slice(value.as_bytes());
        self.bytes.push(0);
    }

    pub(crate) fn signature(&mut self, value: &str) {
        self.bytes.push(value.len() as u8);
        self.bytes.extend_from_slice(value.as_bytes());
        self.bytes.push(0);
    }

    /// An array whose elements need `align`; `fill` writes them.
    pub(crate) fn array(&mut self, align: usize, fill: impl FnOnce(&mut Self)) {
        self.u32(0);
        let at = self.bytes.len() - 4;
        // The padding before the first element is not part of the array's length.
        self.align(align);
        let start = self.bytes.len();
        fill(self);
        let len = (self.bytes.len() - start) as u32;
        self.bytes[at..at + 4].copy_from_slice(&len.to_le_bytes());
    }

    pub(crate) fn variant(&mut self, value: &Value) {
        self.signature(value.signature());
        match value {
            Value::Bool(b) => self.u32(u32::from(*b)),
            Value::U64(n) => self.u64(*n),
            Value::Str(s) => self.str(s),
            Value::U32s(list) => self.array(4, |e| list.iter().for_each(|n| e.u32(*n))),
            Value::Bytes(list) => self.array(1, |e| e.bytes.extend_from_slice(list)),
        }
    }

    /// `a(sv)`
    pub(crate) fn properties(&mut self, properties: &[(&str, Value)]) {
        self.array(8, |e| {
            for (name, value) in properties {
                e.align(8);
                e.str(name);
                e.variant(value);
            }
        });
    }
}

/// Reads what [`Encoder`] writes. Every method is `None` at the end of the bytes, or where they are not
/// what they should be.
#[derive(Debug)]
pub(crate) struct Decoder<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Decoder<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    pub(crate) fn at_end(&self) -> bool {
        self.at >= self.bytes.len()
    }

    pub(crate) fn align(&mut self, to: usize) {
        self.at = self.at.next_multiple_of(to);
    }

    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let taken = self.bytes.get(self.at..self.at.checked_add(n)?)?;
        self.at += n;
        Some(taken)
    }

    pub(crate) fn byte(&mut self) -> Option<u8> {
        self.take(1).map(|b| b[0])
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.align(4);
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    pub(crate) fn str(&mut self) -> Option<&'a str> {
        let len = self.u32()? as usize;
        let text = self.take(len)?;
        self.take(1)?;
        std::str::from_utf8(text).ok()
    }

    pub(crate) fn signature(&mut self) -> Option<&'a str> {
        let len = usize::from(self.byte()?);
        let text = self.take(len)?;
        self.take(1)?;
        std::str::from_utf8(text).ok()
    }

    /// The bytes of an array, without the padding before them; what is in them is aligned as here.
    #[cfg(test)]
    pub(crate) fn array(&mut self, align: usize) -> Option<Decoder<'a>> {
        let len = self.u32()? as usize;
        self.align(align);
        let end = self.at.checked_add(len)?;
        let bytes = self.bytes.get(..end)?;
        let inner = Decoder { bytes, at: self.at };
        self.at = end;
        Some(inner)
    }

    #[cfg(test)]
    fn u64(&mut self) -> Option<u64> {
        self.align(8);
        Some(u64::from_le_bytes(self.take(8)?.try_into().ok()?))
    }

    #[cfg(test)]
    pub(crate) fn variant(&mut self) -> Option<Value> {
        Some(match self.signature()? {
            "b" => Value::Bool(self.u32()? == 1),
            "t" => Value::U64(self.u64()?),
            "s" => Value::Str(self.str()?.to_owned()),
            "au" => {
                let mut inner = self.array(4)?;
                let mut list = Vec::new();
                while !inner.at_end() {
                    list.push(inner.u32()?);
                }
                Value::U32s(list)
            }
            "ay" => {
                let inner = self.array(1)?;
                Value::Bytes(inner.bytes[inner.at..].to_vec())
            }
            _ => return None,
        })
    }
}

/// What a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Call,
    Return,
    Error,
    Signal,
}

/// A message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) kind: Kind,
    pub(crate) serial: u32,
    /// Of a call: nobody waits for the answer.
    pub(crate) no_reply: bool,
    pub(crate) reply_to: u32,
    pub(crate) destination: String,
    pub(crate) path: String,
    pub(crate) interface: String,
    pub(crate) member: String,
    pub(crate) error: String,
    pub(crate) signature: String,
    pub(crate) body: Vec<u8>,
}

impl Message {
    /// A message of this kind in which everything else is empty.
    pub(crate) fn new(kind: Kind) -> Self {
        Self {
            kind,
            serial: 0,
            no_reply: false,
            reply_to: 0,
            destination: String::new(),
            path: String::new(),
            interface: String::new(),
            member: String::new(),
            error: String::new(),
            signature: String::new(),
            body: Vec::new(),
        }
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut e = Encoder::default();
        e.byte(b'l');
        e.byte(match self.kind {
            Kind::Call => 1,
            Kind::Return => 2,
            Kind::Error => 3,
            Kind::Signal => 4,
        });
        e.byte(u8::from(self.no_reply));
        e.byte(1);
        e.u32(self.body.len() as u32);
        e.u32(self.serial);
        e.array(8, |e| {
            let texts = [
                (1, "o", &self.path),
                (2, "s", &self.interface),
                (3, "s", &self.member),
                (4, "s", &self.error),
                (6, "s", &self.destination),
            ];
            for (code, kind, text) in texts.into_iter().filter(|(_, _, t)| !t.is_empty()) {
                e.align(8);
                e.byte(code);
                e.signature(kind);
                e.str(text);
            }
            if self.reply_to != 0 {
                e.align(8);
                e.byte(5);
                e.signature("u");
                e.u32(self.reply_to);
            }
            if !self.signature.is_empty() {
                e.align(8);
                e.byte(8);
                e.signature("g");
                e.signature(&self.signature);
            }
        });
        e.align(8);
        let mut bytes = e.into_bytes();
        bytes.extend_from_slice(&self.body);
        bytes
    }

    /// Takes the first message of a buffer. `Ok(None)`: not all of it is there yet.
    pub(crate) fn decode(buffer: &mut Vec<u8>) -> Result<Option<Self>, &'static str> {
        let Some(fixed) = buffer.get(..16) else {
            return Ok(None);
        };
        if fixed[0] != b'l' {
            return Err("a message that is not little-endian");
        }
        if fixed[3] != 1 {
            return Err("a message of another protocol version");
        }
        let mut d = Decoder {
            bytes: fixed,
            at: 4,
        };
        let (Some(body), Some(serial), Some(fields)) = (d.u32(), d.u32(), d.u32()) else {
            return Err("a header that ends early");
        };
        let (body, fields) = (body as usize, fields as usize);
        if body > LONGEST || fields > LONGEST {
            return Err("a message that is too long");
        }
        let start = (16 + fields).next_multiple_of(8);
        if buffer.len() < start + body {
            return Ok(None);
        }
        let mut message = Self::new(match fixed[1] {
            1 => Kind::Call,
            2 => Kind::Return,
            3 => Kind::Error,
            4 => Kind::Signal,
            _ => return Err("a message of an unknown kind"),
        });
        message.serial = serial;
        message.no_reply = fixed[2] & 1 != 0;
        let header = Decoder {
            bytes: &buffer[..16 + fields],
            at: 16,
        };
        message
            .fields(header)
            .ok_or("a header that makes no sense")?;
        message.body = buffer[start..start + body].to_vec();
        buffer.drain(..start + body);
        Ok(Some(message))
    }

    fn fields(&mut self, mut d: Decoder<'_>) -> Option<()> {
        while !d.at_end() {
            d.align(8);
            let code = d.byte()?;
            match d.signature()? {
                "s" | "o" => {
                    let text = d.str()?.to_owned();
                    match code {
                        1 => self.path = text,
                        2 => self.interface = text,
                        3 => self.member = text,
                        4 => self.error = text,
                        6 => self.destination = text,
                        _ => {}
                    }
                }
                "g" => {
                    let text = d.signature()?.to_owned();
                    if code == 8 {
                        self.signature = text;
                    }
                }
                "u" => {
                    let number = d.u32()?;
                    if code == 5 {
                        self.reply_to = number;
                    }
                }
                _ => return None,
            }
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_call_is_written_as_the_specification_says() {
        let mut call = Message::new(Kind::Call);
        call.serial = 1;
        call.destination = "org.freedesktop.DBus".into();
        call.path = "/org/freedesktop/DBus".into();
        call.interface = "org.freedesktop.DBus".into();
        call.member = "Hello".into();
        // What dbus-send and busctl send, but for the order of the header's fields, which is free.
        let expected = b"l\x01\x00\x01\0\0\0\0\x01\0\0\0\x6d\0\0\0\
            \x01\x01o\0\x15\0\0\0/org/freedesktop/DBus\0\0\0\
            \x02\x01s\0\x14\0\0\0org.freedesktop.DBus\0\0\0\0\
            \x03\x01s\0\x05\0\0\0Hello\0\0\0\
            \x06\x01s\0\x14\0\0\0org.freedesktop.DBus\0\0\0\0";
        assert_eq!(call.encode(), expected);
    }

    #[test]
    fn properties_are_aligned() {
        let properties = [
            ("A", Value::U64(u64::MAX)),
            ("Bee", Value::Bool(true)),
            ("C", Value::U32s(vec![1, 2])),
            ("D", Value::Bytes(vec![0xff])),
            ("E", Value::Str("e".into())),
            ("F", Value::U32s(Vec::new())),
        ];
        let mut e = Encoder::default();
        e.str("x");
        e.properties(&properties);
        let bytes = e.into_bytes();
        assert_eq!(&bytes[..6], b"\x01\0\0\0x\0");
        // The array's length, and its first element at a multiple of eight.
        assert_eq!(&bytes[16..24], b"\x01\0\0\0A\0\x01t");
        let mut d = Decoder::new(&bytes);
        assert_eq!(d.str(), Some("x"));
        let mut list = d.array(8).expect("an array");
        for (name, value) in &properties {
            list.align(8);
            assert_eq!(list.str(), Some(*name));
            assert_eq!(list.variant().as_ref(), Some(value));
        }
        assert!(list.at_end() && d.at_end());
    }

    #[test]
    fn what_is_no_message_is_refused() {
        assert_eq!(Message::decode(&mut b"l\x01\0\x01".to_vec()), Ok(None));
        assert!(Message::decode(&mut vec![b'B'; 16]).is_err());
        assert!(Message::decode(&mut vec![b'l'; 16]).is_err());
        let mut long = b"l\x01\0\x01\xff\xff\xff\xff\x01\0\0\0\0\0\0\0".to_vec();
        assert!(Message::decode(&mut long).is_err());
    }

    proptest! {
        #[test]
        fn messages_survive_the_wire(
            kind in prop_oneof![Just(Kind::Call), Just(Kind::Return), Just(Kind::Error), Just(Kind::Signal)],
            serial in 1u32.., reply_to: u32, no_reply: bool,
            texts in prop::array::uniform6("[a-zA-Z./]{0,20}"),
            body in prop::collection::vec(any::<u8>(), 0..100),
            cut in 0usize..100,
        ) {
            let [path, interface, member, error, destination, signature] = texts;
            let message = Message {
                kind, serial, no_reply, reply_to, destination, path, interface, member, error, signature, body,
            };
            let mut bytes = message.encode();
            let whole = bytes.clone();
            let mut part = whole[..cut.min(whole.len() - 1)].to_vec();
            prop_assert_eq!(Message::decode(&mut part), Ok(None));
            bytes.extend_from_slice(&whole);
            prop_assert_eq!(Message::decode(&mut bytes), Ok(Some(message)));
            prop_assert_eq!(bytes, whole);
        }

        #[test]
        fn garbage_does_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut buffer = b"l\x02\x00\x01".to_vec();
            buffer.extend(bytes);
            let _ = Message::decode(&mut buffer);
        }
    }
}
