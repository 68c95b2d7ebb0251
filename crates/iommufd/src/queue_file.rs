//! What the descriptors of fault queues and event queues share: how they come to be, and what they keep.

use crate::context::Open;
use crate::device::lock;
use crate::object::{Held, Object};
use crate::table::{Call, Reply};
use crate::{Answer, Context, File};
use std::sync::{Arc, Mutex};

/// What keeps an event queue and its context as long as its descriptor is open. The queue goes first.
pub(crate) struct Keeps<T: Object>(Mutex<Option<(Held<T>, Open)>>);

impl<T: Object> Keeps<T> {
    pub(crate) fn new(queue: &Arc<T>, context: &Context) -> Answer<Self> {
        Ok(Self(Mutex::new(Some((Held::new(queue)?, context.hold())))))
    }

    pub(crate) fn let_go(&self) {
        let kept = lock(&self.0).take();
        drop(kept);
    }
}

/// Gives a queue its descriptor, the caller its answer, and only then the queue to those who look for it: an answer that cannot be written leaves
/// nothing behind.
pub(crate) fn with_file<T: Object, F: File>(
    call: &Call<'_, Context>,
    queue: &Arc<T>,
    file: impl FnOnce(Keeps<T>) -> F,
    answer: impl FnOnce(u32) -> Vec<u8>,
) -> Answer<Reply> {
    let context = call.target;
    let installed = Keeps::new(queue, context).and_then(|keeps| {
        let fd = call.caller.install(Arc::new(file(keeps)))?;
        call.caller.write(call.at, &answer(fd.cast_unsigned()))
    });
    match installed {
        Ok(()) => {
            context.publish(Arc::clone(queue) as _);
            Ok(Reply::Done)
        }
        Err(refusal) => {
            queue.destroy(context);
            context.abandon(&**queue);
            Err(refusal)
        }
    }
}
