//! One or more of something. Most calls are about one area, which then needs no memory of its own.

use addr::OutOfMemory;
use std::ops::Deref;

pub(crate) enum Few<T> {
    One([T; 1]),
    Many(Vec<T>),
}

impl<T> Few<T> {
    /// Turns each into something else, in order.
    pub(crate) fn try_map<U, E: From<OutOfMemory>>(self, mut map: impl FnMut(T) -> Result<U, E>) -> Result<Few<U>, E> {
        match self {
            Self::One([one]) => Ok(Few::One([map(one)?])),
            Self::Many(all) => {
                let mut mapped = Vec::new();
                mapped.try_reserve_exact(all.len()).map_err(|_| OutOfMemory)?;
                for one in all {
                    mapped.push(map(one)?);
                }
                Ok(Few::Many(mapped))
            }
        }
    }
}

impl<T> Deref for Few<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        match self {
            Self::One(one) => one,
            Self::Many(all) => all,
        }
    }
}
