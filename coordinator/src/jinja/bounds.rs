//! What one rendering may use: steps, and bytes of what it makes.

use std::{
    any::Any,
    cell::{Cell, RefCell},
    rc::Rc,
};

use super::error::{Error, Result};

/// Steps a template may take; a rendering of a long chat takes thousands.
const FUEL: u64 = 10_000_000;
/// Bytes of a text that are looked at in one step.
const BYTES_PER_STEP: usize = 64;
/// Bytes of all values that a rendering makes: some times those of its output.
const MAX_BYTES: usize = 256 << 20;
/// Largest text that it makes.
pub(super) const MAX_TEXT: usize = 16 << 20;
/// Calls, statements and expressions inside each other, so that the stack of a thread of 2 MiB is never used up.
const MAX_DEPTH: usize = 150;

/// What is left of it, and what lives as long as the rendering.
#[derive(Debug)]
pub(super) struct Bounds {
    fuel: Cell<u64>,
    bytes: Cell<usize>,
    depth: Cell<usize>,
    kept: RefCell<Vec<Rc<dyn Any>>>,
}

impl Default for Bounds {
    fn default() -> Self {
        Bounds {
            fuel: Cell::new(FUEL),
            bytes: Cell::new(MAX_BYTES),
            depth: Cell::new(0),
            kept: RefCell::default(),
        }
    }
}

impl Bounds {
    /// Counts a step.
    pub fn step(&self) -> Result<()> {
        self.work(0)
    }

    /// Counts a step that looks at so many bytes.
    pub fn work(&self, bytes: usize) -> Result<()> {
        let steps = 1 + (bytes / BYTES_PER_STEP) as u64;
        let left = self.fuel.get().checked_sub(steps);
        let left = left.ok_or_else(|| Error::new(format!("it takes more than {FUEL} steps")))?;
        self.fuel.set(left);
        Ok(())
    }

    /// Counts bytes before they are taken.
    pub fn reserve(&self, bytes: usize) -> Result<()> {
        self.work(bytes)?;
        let left = self.bytes.get().checked_sub(bytes);
        let left =
            left.ok_or_else(|| Error::new(format!("it makes values of more than {MAX_BYTES} bytes")))?;
        self.bytes.set(left);
        Ok(())
    }

    /// Counts a text of so many bytes before it is made.
    pub fn reserve_text(&self, bytes: usize) -> Result<()> {
        if bytes > MAX_TEXT {
            return Err(Error::new(format!("it makes a text of more than {MAX_TEXT} bytes")));
        }
        self.reserve(bytes)
    }

    /// Keeps something until the rendering ends.
    pub fn keep(&self, thing: Rc<dyn Any>) {
        self.kept.borrow_mut().push(thing);
    }

    /// Goes one level deeper, for as long as what is returned is kept.
    pub fn deeper(&self) -> Result<Level<'_>> {
        self.step()?;
        if self.depth.get() == MAX_DEPTH {
            return Err(Error::new(format!(
                "more than {MAX_DEPTH} calls and expressions are inside each other"
            )));
        }
        self.depth.set(self.depth.get() + 1);
        Ok(Level(self))
    }
}

/// One level; dropping it goes up again.
pub(super) struct Level<'a>(&'a Bounds);

impl Drop for Level<'_> {
    fn drop(&mut self) {
        self.0.depth.set(self.0.depth.get() - 1);
    }
}
