//! Values of one type, as JSON, under one prefix.

use std::marker::PhantomData;
use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::{CommitError, TypedError, WatchError};
use crate::store::{Store, Watch};
use crate::types::{Change, Compare, Entry, Op, Revision, Txn};

/// A view of the keys below `prefix`, each holding a `T` as JSON. What follows the prefix is the value's
/// id. Cheap to clone.
pub struct Typed<T> {
    store: Arc<dyn Store>,
    prefix: Arc<str>,
    values: PhantomData<fn() -> T>,
}

/// A value and the revision to name when changing it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Versioned<T> {
    pub id: String,
    pub value: T,
    pub revision: Revision,
}

/// All values at one revision, ordered by id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TypedListing<T> {
    pub values: Vec<Versioned<T>>,
    /// Watch from its successor.
    pub revision: Revision,
}

/// One change of one value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TypedEvent<T> {
    pub revision: Revision,
    pub change: TypedChange<T>,
}

/// What happened to a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TypedChange<T> {
    Put(Versioned<T>),
    Delete { id: String, prev_revision: Revision },
}

/// Changes of values, see [`Watch`].
#[derive(Debug)]
pub struct TypedWatch<T> {
    watch: Watch,
    prefix: Arc<str>,
    values: PhantomData<fn() -> T>,
}

impl<T> Clone for Typed<T> {
    fn clone(&self) -> Self {
        Self { store: Arc::clone(&self.store), prefix: Arc::clone(&self.prefix), values: PhantomData }
    }
}

impl<T: Serialize + DeserializeOwned> Typed<T> {
    /// A view of `store` below `prefix`, which by custom ends with `/`.
    pub fn new(store: Arc<dyn Store>, prefix: &str) -> Self {
        Self { store, prefix: prefix.into(), values: PhantomData }
    }

    /// The key that holds `id`, for a [`Txn`] over several types.
    pub fn key(&self, id: &str) -> String {
        format!("{}{id}", self.prefix)
    }

    /// The value of `id`, if there is one.
    pub async fn get(&self, id: &str) -> Result<Option<Versioned<T>>, TypedError> {
        match self.store.get(&self.key(id)).await? {
            Some(entry) => Ok(Some(decode(&self.prefix, entry)?)),
            None => Ok(None),
        }
    }

    /// All values.
    pub async fn list(&self) -> Result<TypedListing<T>, TypedError> {
        let listing = self.store.list(&self.prefix).await?;
        let values = listing.entries.into_iter().map(|entry| decode(&self.prefix, entry)).collect::<Result<_, _>>()?;
        Ok(TypedListing { values, revision: listing.revision })
    }

    /// Puts a value that must not exist yet; [`TypedError::Conflict`] if it does.
    pub async fn create(&self, id: &str, value: &T) -> Result<Revision, TypedError> {
        let txn = Txn::new(vec![self.put_op(id, value)?]).only_if(Compare::absent(self.key(id)));
        self.commit(txn).await
    }

    /// Puts a value that must still be at `revision`; [`TypedError::Conflict`] if it is not.
    pub async fn update(&self, id: &str, value: &T, revision: Revision) -> Result<Revision, TypedError> {
        let txn = Txn::new(vec![self.put_op(id, value)?]).only_if(Compare::revision(self.key(id), revision));
        self.commit(txn).await
    }

    /// Puts a value whatever was there.
    pub async fn put(&self, id: &str, value: &T) -> Result<Revision, TypedError> {
        self.commit(Txn::new(vec![self.put_op(id, value)?])).await
    }

    /// Deletes a value that must still be at `revision`; [`TypedError::Conflict`] if it is not.
    pub async fn delete(&self, id: &str, revision: Revision) -> Result<Revision, TypedError> {
        let key = self.key(id);
        self.commit(Txn::new(vec![Op::delete(key.clone())]).only_if(Compare::revision(key, revision))).await
    }

    /// The put of a value, as part of a larger transaction.
    pub fn put_op(&self, id: &str, value: &T) -> Result<Op, TypedError> {
        // An empty id would be the prefix itself, which no listing could name.
        if id.is_empty() {
            return Err(CommitError::KeyLength { bytes: 0 }.into());
        }
        let key = self.key(id);
        match serde_json::to_vec(value) {
            Ok(value) => Ok(Op::put(key, value)),
            Err(source) => Err(TypedError::Encode { key, source: Arc::new(source) }),
        }
    }

    /// The delete of a value, as part of a larger transaction.
    pub fn delete_op(&self, id: &str) -> Op {
        Op::delete(self.key(id))
    }

    /// Changes from revision `from` on, inclusive.
    pub async fn watch(&self, from: Revision) -> Result<TypedWatch<T>, TypedError> {
        let watch = self.store.watch(&self.prefix, from).await?;
        Ok(TypedWatch { watch, prefix: Arc::clone(&self.prefix), values: PhantomData })
    }

    async fn commit(&self, txn: Txn) -> Result<Revision, TypedError> {
        Ok(self.store.commit(txn).await?.committed()?)
    }
}

impl<T: DeserializeOwned> TypedWatch<T> {
    /// Waits for the next change. Cancel-safe. A value that cannot be read is an error of that event
    /// only; the watch goes on.
    pub async fn next(&mut self) -> Result<TypedEvent<T>, TypedError> {
        let event = self.watch.next().await?;
        let change = match event.change {
            Change::Put(entry) => TypedChange::Put(decode(&self.prefix, entry)?),
            Change::Delete { key, prev_revision } => {
                TypedChange::Delete { id: id_of(&self.prefix, &key), prev_revision }
            }
        };
        Ok(TypedEvent { revision: event.revision, change })
    }
}

impl TypedError {
    /// Whether a watch ended because its reader must list again (too slow, or history is gone).
    pub fn must_list_again(&self) -> bool {
        matches!(self, Self::Watch(WatchError::Lagged { .. } | WatchError::Compacted { .. }))
    }
}

fn decode<T: DeserializeOwned>(prefix: &str, entry: Entry) -> Result<Versioned<T>, TypedError> {
    match serde_json::from_slice(&entry.value) {
        Ok(value) => Ok(Versioned { id: id_of(prefix, &entry.key), value, revision: entry.mod_revision }),
        Err(source) => {
            Err(TypedError::Decode { key: entry.key, revision: entry.mod_revision, source: Arc::new(source) })
        }
    }
}

fn id_of(prefix: &str, key: &str) -> String {
    key.strip_prefix(prefix).unwrap_or(key).to_owned()
}
