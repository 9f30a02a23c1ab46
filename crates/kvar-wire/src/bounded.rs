//! Lists and texts with a bound that is checked before anything is reserved, in both directions:
//! a sender learns of its mistake, and a receiver never trusts a length.

use kvar_base::BlockId;
use serde::de::{Error as _, SeqAccess, Visitor};
use serde::ser::{Error as _, SerializeSeq};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use smallvec::SmallVec;
use std::fmt;
use std::marker::PhantomData;

const ID_BYTES: usize = 32;

/// `#[serde(with = "List::<MAX>")]` for a list of at most `MAX` elements.
pub(crate) struct List<const MAX: usize>;

impl<const MAX: usize> List<MAX> {
    pub(crate) fn serialize<T: Serialize, S: Serializer>(
        list: &[T],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        if list.len() > MAX {
            return Err(S::Error::custom("list too long"));
        }
        let mut sequence = serializer.serialize_seq(Some(list.len()))?;
        list.iter()
            .try_for_each(|element| sequence.serialize_element(element))?;
        sequence.end()
    }

    pub(crate) fn deserialize<'de, L, D>(deserializer: D) -> Result<L, D::Error>
    where
        L: Elements<Element: Deserialize<'de>>,
        D: Deserializer<'de>,
    {
        struct Visit<L, const MAX: usize>(PhantomData<L>);
        impl<'de, L: Elements<Element: Deserialize<'de>>, const MAX: usize> Visitor<'de> for Visit<L, MAX> {
            type Value = L;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "at most {MAX} elements")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<L, A::Error> {
                let claimed = sequence.size_hint().unwrap_or(0);
                if claimed > MAX {
                    return Err(A::Error::custom("list too long"));
                }
                let mut list = L::with_capacity(claimed);
                let mut count = 0;
                while let Some(element) = sequence.next_element()? {
                    if count == MAX {
                        return Err(A::Error::custom("list too long"));
                    }
                    count += 1;
                    list.push(element);
                }
                Ok(list)
            }
        }
        deserializer.deserialize_seq(Visit::<L, MAX>(PhantomData))
    }
}

/// What a [`List`] is read into.
pub(crate) trait Elements {
    type Element;
    fn with_capacity(elements: usize) -> Self;
    fn push(&mut self, element: Self::Element);
}

impl<T> Elements for Vec<T> {
    type Element = T;
    fn with_capacity(elements: usize) -> Self {
        Self::with_capacity(elements)
    }
    fn push(&mut self, element: T) {
        self.push(element);
    }
}

impl<T> Elements for SmallVec<[T; 1]> {
    type Element = T;
    fn with_capacity(elements: usize) -> Self {
        Self::with_capacity(elements)
    }
    fn push(&mut self, element: T) {
        self.push(element);
    }
}

/// `#[serde(with = "Ids::<MAX>")]` for ids in one piece of bytes: 16,384 of them are copied, not
/// visited one byte at a time.
pub(crate) struct Ids<const MAX: usize>;

impl<const MAX: usize> Ids<MAX> {
    pub(crate) fn serialize<S: Serializer>(
        ids: &[BlockId],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        if ids.len() > MAX {
            return Err(S::Error::custom("too many ids"));
        }
        let mut bytes = Vec::with_capacity(ids.len() * ID_BYTES);
        ids.iter()
            .for_each(|id| bytes.extend_from_slice(id.as_bytes()));
        serializer.serialize_bytes(&bytes)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<BlockId>, D::Error> {
        struct IdBytes<const MAX: usize>;
        impl<const MAX: usize> Visitor<'_> for IdBytes<MAX> {
            type Value = Vec<BlockId>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "at most {MAX} ids of {ID_BYTES} bytes")
            }
            fn visit_bytes<E: serde::de::Error>(self, bytes: &[u8]) -> Result<Self::Value, E> {
                let (ids, rest) = bytes.as_chunks::<ID_BYTES>();
                if !rest.is_empty() || ids.len() > MAX {
                    return Err(E::custom("not a list of ids within bounds"));
                }
                Ok(ids.iter().map(|id| BlockId::new(*id)).collect())
            }
        }
        deserializer.deserialize_bytes(IdBytes::<MAX>)
    }
}

/// `#[serde(with = "Bytes::<MAX>")]` for raw bytes.
pub(crate) struct Bytes<const MAX: usize>;

impl<const MAX: usize> Bytes<MAX> {
    pub(crate) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        if bytes.len() > MAX {
            return Err(S::Error::custom("too many bytes"));
        }
        serializer.serialize_bytes(bytes)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<u8>, D::Error> {
        struct Raw<const MAX: usize>;
        impl<const MAX: usize> Visitor<'_> for Raw<MAX> {
            type Value = Vec<u8>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "at most {MAX} bytes")
            }
            fn visit_bytes<E: serde::de::Error>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
                if bytes.len() > MAX {
                    return Err(E::custom("too many bytes"));
                }
                Ok(bytes.to_vec())
            }
        }
        d.deserialize_bytes(Raw::<MAX>)
    }
}

/// `#[serde(with = "Text::<MAX>")]` for UTF-8 text of at most `MAX` bytes.
pub(crate) struct Text<const MAX: usize>;

impl<const MAX: usize> Text<MAX> {
    pub(crate) fn serialize<S: Serializer>(text: &str, serializer: S) -> Result<S::Ok, S::Error> {
        if text.len() > MAX {
            return Err(S::Error::custom("text too long"));
        }
        serializer.serialize_str(text)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<String, D::Error> {
        struct Words<const MAX: usize>;
        impl<const MAX: usize> Visitor<'_> for Words<MAX> {
            type Value = String;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a text of at most {MAX} bytes")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<String, E> {
                if text.len() > MAX {
                    return Err(E::custom("text too long"));
                }
                Ok(text.to_owned())
            }
        }
        d.deserialize_str(Words::<MAX>)
    }
}
