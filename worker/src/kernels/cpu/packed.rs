//! Weight matrices packed into tiles of 16 outputs, so that one contiguous stream feeds 16 independent chains.

use half::{bf16, f16};
use strata_proto::DType;

use crate::kernels::buffer::{Element, OutOfMemory, Values, with_values};

/// Outputs per tile: the lanes of every kernel.
pub const LANES: usize = 16;

/// A value of the checkpoint that the target format cannot hold, or NaN.
#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[error("the value {0} does not fit the format")]
pub struct Unrepresentable(pub f32);

/// A weight matrix `(n, k)` as tiles `[n/16][k][16]`; outputs past `n` are zero.
pub struct PackedMatrix {
    n: usize,
    k: usize,
    values: Values,
}

impl PackedMatrix {
    /// Bytes that an `(n, k)` matrix occupies.
    pub fn bytes_for(n: usize, k: usize, dtype: DType) -> u64 {
        Values::bytes_for(n.next_multiple_of(LANES) * k, dtype)
    }

    /// An `(n, k)` matrix of zeros.
    pub fn zeros(n: usize, k: usize, dtype: DType) -> Result<Self, OutOfMemory> {
        Ok(PackedMatrix { n, k, values: Values::zeros(n.next_multiple_of(LANES) * k, dtype)? })
    }

    /// Outputs.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Inputs.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Bytes it occupies.
    pub fn bytes(&self) -> u64 {
        self.values.bytes()
    }

    /// The tiles.
    pub fn values(&self) -> &Values {
        &self.values
    }

    /// Writes checkpoint elements `data` (little endian, of format `from`) that start at element `first` of their
    /// tensor; `place` gives the row and column of each.
    pub fn write(
        &mut self,
        first: usize,
        data: &[u8],
        from: DType,
        place: impl Fn(usize) -> (usize, usize),
    ) -> Result<(), Unrepresentable> {
        let k = self.k;
        let at = |i: usize| {
            let (row, column) = place(i);
            (row / LANES * k + column) * LANES + row % LANES
        };
        with_values!(&mut self.values, v => convert(first, data, from, |i, x| v[at(i)] = x))
    }

    /// Row `row` widened into `out`, of `k` elements.
    pub fn gather(&self, row: usize, out: &mut [f32]) {
        let start = row / LANES * self.k * LANES + row % LANES;
        with_values!(&self.values, v => {
            for (o, x) in out.iter_mut().zip(v[start..].iter().step_by(LANES)) {
                *o = x.to_f32();
            }
        });
    }
}

/// A table `(rows, width)` as the checkpoint has it: an embedding without a head beside it.
pub struct Table {
    width: usize,
    values: Values,
}

impl Table {
    /// Bytes that a `(rows, width)` table occupies.
    pub fn bytes_for(rows: usize, width: usize, dtype: DType) -> u64 {
        Values::bytes_for(rows * width, dtype)
    }

    /// A `(rows, width)` table of zeros.
    pub fn zeros(rows: usize, width: usize, dtype: DType) -> Result<Self, OutOfMemory> {
        Ok(Table { width, values: Values::zeros(rows * width, dtype)? })
    }

    /// Bytes it occupies.
    pub fn bytes(&self) -> u64 {
        self.values.bytes()
    }

    /// Writes checkpoint elements `data` (little endian, of format `from`) from element `first` on.
    pub fn write(&mut self, first: usize, data: &[u8], from: DType) -> Result<(), Unrepresentable> {
        with_values!(&mut self.values, v => convert(first, data, from, |i, x| v[i] = x))
    }

    /// Row `row` widened into `out`, of `width` elements.
    pub fn gather(&self, row: usize, out: &mut [f32]) {
        with_values!(&self.values, v => {
            for (o, x) in out.iter_mut().zip(&v[row * self.width..]) {
                *o = x.to_f32();
            }
        });
    }
}

/// Widens checkpoint elements to f32 (norms and biases, which every format keeps in f32); `put` gets each with its index.
pub fn read_f32(
    first: usize,
    data: &[u8],
    from: DType,
    put: impl FnMut(usize, f32),
) -> Result<(), Unrepresentable> {
    convert(first, data, from, put)
}

/// Calls `put(first + i, element i of data)` for each element, rounded to `T`.
fn convert<T: Element>(
    first: usize,
    data: &[u8],
    from: DType,
    mut put: impl FnMut(usize, T),
) -> Result<(), Unrepresentable> {
    let mut worst = None;
    let mut one = |i: usize, x: f32| {
        let y = T::from_f32(x);
        if !y.to_f32().is_finite() && !x.is_infinite() {
            worst = Some(x);
        }
        put(first + i, y);
    };
    match from {
        DType::F32 => {
            data.as_chunks().0.iter().enumerate().for_each(|(i, b)| one(i, f32::from_le_bytes(*b)));
        }
        DType::BF16 => {
            let values = data.as_chunks().0.iter().map(|b| Element::to_f32(bf16::from_le_bytes(*b)));
            values.enumerate().for_each(|(i, x)| one(i, x));
        }
        DType::F16 => {
            let values = data.as_chunks().0.iter().map(|b| Element::to_f32(f16::from_le_bytes(*b)));
            values.enumerate().for_each(|(i, x)| one(i, x));
        }
    }
    worst.map_or(Ok(()), |x| Err(Unrepresentable(x)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packing_in_pieces_and_gathering_gives_the_rows_back() {
        let (n, k) = (37, 19);
        let source: Vec<f32> = (0..n * k).map(|i| (i as f32 * 0.37).sin()).collect();
        for dtype in DType::ALL {
            let mut packed = PackedMatrix::zeros(n, k, dtype).unwrap();
            let mut table = Table::zeros(n, k, dtype).unwrap();
            let bytes: Vec<u8> = source.iter().flat_map(|x| x.to_le_bytes()).collect();
            for (piece, data) in bytes.chunks(4 * 23).enumerate() {
                packed.write(piece * 23, data, DType::F32, |i| (i / k, i % k)).unwrap();
                table.write(piece * 23, data, DType::F32).unwrap();
            }
            assert_eq!(packed.bytes(), PackedMatrix::bytes_for(n, k, dtype));
            assert_eq!(table.bytes(), Table::bytes_for(n, k, dtype));
            let (mut a, mut b) = (vec![0.0; k], vec![0.0; k]);
            for row in 0..n {
                packed.gather(row, &mut a);
                table.gather(row, &mut b);
                assert_eq!(a, b);
                for (x, y) in a.iter().zip(&source[row * k..]) {
                    assert_eq!(*x, crate::kernels::buffer::round_to(dtype, *y));
                }
            }
        }
    }

    #[test]
    fn a_value_too_large_for_f16_and_nan_are_refused() {
        let mut packed = PackedMatrix::zeros(1, 1, DType::F16).unwrap();
        let e = packed.write(0, &bf16::from_f32(1e6).to_le_bytes(), DType::BF16, |i| (i, i)).unwrap_err();
        assert!(e.0 > 9e5);
        let e = packed.write(0, &f32::NAN.to_le_bytes(), DType::F32, |i| (i, i)).unwrap_err();
        assert!(e.0.is_nan());
        packed.write(0, &f32::INFINITY.to_le_bytes(), DType::F32, |i| (i, i)).unwrap();
    }
}
