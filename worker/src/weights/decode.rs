//! Tensors whose elements are made of the bytes that the files have in their place.

use std::{fmt, ops::Range};

use crate::kernels::{cpu::quant::Group, ops::GROUP};

/// How elements are made of stored bytes. Whoever reads a tensor that has one gets floats.
pub(crate) trait Decode: fmt::Debug + Send + Sync {
    /// Bytes that need no others, and how many elements they make: a block of a format in blocks, else the whole tensor.
    fn unit(&self) -> (u64, usize);

    /// Appends `elements` to `out`, as they lie in a tensor `(…, n, k)`, counted from the beginning of `stored`, which is
    /// whole units. Both ends of `elements` are multiples of 256, or the end of what is stored.
    ///
    /// # Errors
    /// What is wrong with the bytes, and what was expected.
    fn decode(&self, stored: &[u8], elements: Range<usize>, out: &mut Decoded) -> Result<(), String>;
}

/// Elements that were made.
#[derive(Debug, Default)]
pub(crate) struct Decoded {
    /// Their values.
    pub values: Vec<f32>,
    /// The same as groups of 32 beside each other in a row, in order, where they are on such a grid; or nothing for all of a
    /// tensor.
    pub groups: Vec<Option<Group>>,
}

impl Decoded {
    /// Forgets all elements.
    pub fn clear(&mut self) {
        self.values.clear();
        self.groups.clear();
    }
}

/// Elements that are a piece of a tensor on its way, and of what part of it.
pub(crate) const DECODED: usize = 1 << 20;
const _: () = assert!(DECODED.is_multiple_of(GROUP));

/// Makes elements of the bytes of one tensor after the other, as they come.
#[derive(Debug, Default)]
pub(crate) struct Decoder {
    /// Bytes that wait for others.
    stored: Vec<u8>,
    /// Index of the first element that they make.
    next: usize,
    decoded: Decoded,
}

impl Decoder {
    /// Takes the bytes of a tensor that begin at `offset`, and hands what they complete to `each`: the index of the first element,
    /// and at most [`DECODED`] of them.
    ///
    /// # Errors
    /// As [`Decode::decode`], or what `each` says.
    pub fn push<E>(
        &mut self,
        decode: &dyn Decode,
        offset: u64,
        bytes: &[u8],
        wrong: impl Fn(String) -> E,
        mut each: impl FnMut(usize, &Decoded) -> Result<(), E>,
    ) -> Result<(), E> {
        if offset == 0 {
            self.stored.clear();
            self.next = 0;
        }
        self.stored.extend_from_slice(bytes);
        let (unit, elements) = decode.unit();
        let whole = self.stored.len() as u64 / unit.max(1);
        let count = whole as usize * elements;
        for first in (0..count).step_by(DECODED) {
            self.decoded.clear();
            let range = first..count.min(first + DECODED);
            decode.decode(&self.stored, range, &mut self.decoded).map_err(&wrong)?;
            each(self.next + first, &self.decoded)?;
        }
        self.next += count;
        self.stored.drain(..(whole * unit) as usize);
        Ok(())
    }
}
