//! The objects of a context: ids, who needs whom, and how they go.
//!
//! An object has one number that decides about its end: how many others need it for long (*users*). DESTROY works at zero and is `EBUSY`
//! otherwise. A call in flight holds an [`Arc`], which delays nothing but the freeing of memory.

use crate::{Answer, Context, Refusal};
use rustix::io::Errno;
use std::any::Any;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// What every object begins with.
#[derive(Debug, Default)]
pub struct Head {
    id: AtomicU32,
    users: AtomicU32,
}

/// Nobody can become a user of an object with this count any more.
const GONE: u32 = u32::MAX;

impl Head {
    /// Its id; 0 before it has one.
    pub fn id(&self) -> u32 {
        self.id.load(Ordering::Relaxed)
    }

    /// How many others need it.
    pub fn users(&self) -> u32 {
        match self.users.load(Ordering::Acquire) {
            GONE => 0,
            users => users,
        }
    }

    /// Whether it has been destroyed; calls in flight may still have it in hand.
    pub(crate) fn is_gone(&self) -> bool {
        self.users.load(Ordering::Acquire) == GONE
    }

    fn hold(&self) -> bool {
        self.users.fetch_update(Ordering::AcqRel, Ordering::Acquire, |users| (users < GONE - 1).then(|| users + 1)).is_ok()
    }

    /// Ends it if nobody needs it.
    fn end(&self) -> bool {
        self.users.compare_exchange(0, GONE, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }
}

/// Something with an id.
pub trait Object: Any + Send + Sync {
    /// Its id and users.
    fn head(&self) -> &Head;
    /// What it is, for messages: "IOAS", "page table".
    fn kind(&self) -> &'static str;
    /// It has left the table and nobody needs it: let go of everything, of what it needs itself as well. Cannot fail.
    fn destroy(&self, context: &Context);
}

/// A long-term user of an object: as long as this lives, DESTROY answers `EBUSY`.
pub struct Held<T: Object + ?Sized>(Arc<T>);

impl<T: Object + ?Sized> Held<T> {
    /// Becomes a user.
    ///
    /// # Errors
    /// `ENOENT` when the object has just been destroyed.
    pub fn new(object: &Arc<T>) -> Answer<Self> {
        if object.head().hold() { Ok(Self(Arc::clone(object))) } else { Err(no_such(object.head().id(), object.kind())) }
    }
}

impl<T: Object + ?Sized> Deref for Held<T> {
    type Target = Arc<T>;
    fn deref(&self) -> &Arc<T> {
        &self.0
    }
}

impl<T: Object + ?Sized> Drop for Held<T> {
    fn drop(&mut self) {
        self.0.head().users.fetch_sub(1, Ordering::AcqRel);
    }
}

impl<T: Object + ?Sized> fmt::Debug for Held<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.0.kind(), self.0.head().id())
    }
}

pub(crate) fn no_such(id: u32, kind: &str) -> Refusal {
    Refusal::new(Errno::NOENT, format!("there is no {kind} with id {id}; has it been destroyed?"))
}

/// What has an id. An id without an object is taken, but nobody finds it: one in the making, or a tombstone (rules 2, 10).
#[derive(Default)]
pub(crate) struct Table(BTreeMap<u32, Option<Arc<dyn Object>>>);

impl Table {
    /// The lowest free id (rule 1).
    fn free_id(&self) -> Answer<u32> {
        // Ids are dense as long as nothing was destroyed.
        let len = self.0.len() as u32;
        if self.0.last_key_value().is_none_or(|(last, _)| *last == len) {
            return if len < i32::MAX as u32 { Ok(len + 1) } else { Err(Refusal::of(Errno::NOSPC, "no free object id")) };
        }
        let gap = self.0.keys().zip(1..).find(|(id, dense)| **id != *dense);
        Ok(gap.map_or(len + 1, |(_, dense)| dense))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn objects(&self) -> impl Iterator<Item = &Arc<dyn Object>> {
        self.0.values().flatten()
    }
}

impl Context {
    /// Takes an id for `object`; nobody finds it before [`Context::publish`]. Give it back with [`Context::abandon`].
    ///
    /// # Errors
    /// `ENOSPC` without a free id; a fail point, `iommufd.object`.
    pub fn enroll(&self, object: &dyn Object) -> Answer<u32> {
        sync::fail::step("iommufd.object")?;
        let mut table = self.table();
        let id = table.free_id()?;
        table.0.insert(id, None);
        object.head().id.store(id, Ordering::Relaxed);
        Ok(id)
    }

    /// From now on the object can be found by its id.
    pub fn publish(&self, object: Arc<dyn Object>) {
        self.table().0.insert(object.head().id(), Some(object));
    }

    /// Gives an id back whose object never came to life.
    pub fn abandon(&self, object: &dyn Object) {
        self.table().0.remove(&object.head().id());
    }

    /// [`Context::enroll`] and [`Context::publish`] in one, for objects that are complete.
    ///
    /// # Errors
    /// As [`Context::enroll`].
    pub fn add(&self, object: Arc<dyn Object>) -> Answer<u32> {
        let id = self.enroll(&*object)?;
        self.publish(object);
        Ok(id)
    }

    /// The object `id`, if it is a `T` (rule 3). A fail point, `iommufd.lookup`.
    ///
    /// # Errors
    /// `ENOENT`.
    pub fn get<T: Object>(&self, id: u32, kind: &str) -> Answer<Arc<T>> {
        sync::fail::step("iommufd.lookup")?;
        let found = self.table().0.get(&id).cloned().flatten();
        let Some(object) = found else { return Err(no_such(id, kind)) };
        let its = object.kind();
        let any: Arc<dyn Any + Send + Sync> = object;
        any.downcast().map_err(|_| Refusal::new(Errno::NOENT, format!("object {id} is another kind of object than {kind}: {its}")))
    }

    /// The object `id`, whatever it is.
    pub fn find(&self, id: u32) -> Option<Arc<dyn Object>> {
        self.table().0.get(&id).cloned().flatten()
    }

    /// Every object of kind `T`.
    pub fn all<T: Object>(&self) -> Vec<Arc<T>> {
        let all: Vec<Arc<dyn Object>> = self.table().objects().cloned().collect();
        all.into_iter().filter_map(|object| (object as Arc<dyn Any + Send + Sync>).downcast().ok()).collect()
    }

    /// Destroys an object that nobody needs (rule 4).
    ///
    /// # Errors
    /// `ENOENT`, `EBUSY`.
    pub fn destroy(&self, id: u32) -> Answer {
        let object = {
            let mut table = self.table();
            let Some(Some(object)) = table.0.get(&id) else { return Err(no_such(id, "object")) };
            if !object.head().end() {
                let text = format!("{} {id} is needed by {} others; destroy or detach those first", object.kind(), object.head().users());
                return Err(Refusal::new(Errno::BUSY, text));
            }
            table.0.remove(&id).flatten()
        };
        object.iter().for_each(|object| object.destroy(self));
        Ok(())
    }

    /// Destroys an object that nobody needs, and leaves its id unusable (rule 10). `false` when somebody needs it.
    pub fn entomb(&self, id: u32) -> bool {
        let object = {
            let mut table = self.table();
            match table.0.get_mut(&id) {
                Some(place) if place.as_ref().is_some_and(|object| object.head().end()) => place.take(),
                _ => return false,
            }
        };
        object.iter().for_each(|object| object.destroy(self));
        true
    }

    /// Destroys this very object if nobody needs it, whoever has its id by now; with `entomb` the id stays unusable (rule 10). `false` when
    /// somebody needs it, or it is gone already.
    pub fn destroy_this(&self, object: &Arc<dyn Object>, entomb: bool) -> bool {
        let id = object.head().id();
        {
            let mut table = self.table();
            match table.0.get_mut(&id) {
                Some(place) if place.as_ref().is_some_and(|own| Arc::ptr_eq(own, object) && own.head().end()) => *place = None,
                _ => return false,
            }
            if !entomb {
                table.0.remove(&id);
            }
        }
        object.destroy(self);
        true
    }

    /// Destroys everything, those first that nobody needs (rule 11).
    pub(crate) fn destroy_all(&self) {
        loop {
            let ids: Vec<u32> = self.table().0.iter().filter(|(_, object)| object.is_some()).map(|(id, _)| *id).collect();
            let gone = ids.iter().rev().filter(|id| self.destroy(**id).is_ok()).count();
            if gone == 0 {
                break;
            }
        }
    }
}
