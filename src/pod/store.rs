//! Objects by id, readable without waiting for anything but a lookup.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::Arc;

use parking_lot::RwLock;

/// A snapshot-readable table. The lock guards the map only: nothing is ever done under it.
pub struct Store<T> {
    objects: RwLock<BTreeMap<String, Arc<T>>>,
}

/// What looking for an id gave.
#[derive(Debug)]
pub enum Found<T> {
    /// The one object.
    One(Arc<T>),
    /// There is none.
    None,
    /// The abbreviation fits several.
    Many(usize),
}

impl<T> Default for Store<T> {
    fn default() -> Self {
        Self {
            objects: RwLock::default(),
        }
    }
}

impl<T> Store<T> {
    /// The object of exactly this id, or the only one whose id begins with it.
    pub fn find(&self, id: &str) -> Found<T> {
        let objects = self.objects.read();
        if let Some(object) = objects.get(id) {
            return Found::One(object.clone());
        }
        if id.is_empty() {
            return Found::None;
        }
        let mut fits = objects
            .range::<str, _>((Bound::Included(id), Bound::Unbounded))
            .take_while(|(key, _)| key.starts_with(id));
        match (fits.next(), fits.next()) {
            (None, _) => Found::None,
            (Some((_, object)), None) => Found::One(object.clone()),
            (Some(_), Some(_)) => Found::Many(2 + fits.count()),
        }
    }

    /// The object of exactly this id.
    pub fn get(&self, id: &str) -> Option<Arc<T>> {
        self.objects.read().get(id).cloned()
    }

    /// All objects, in the order of their ids.
    pub fn all(&self) -> Vec<Arc<T>> {
        self.objects.read().values().cloned().collect()
    }

    /// Enters an object.
    pub fn insert(&self, id: &str, object: Arc<T>) {
        self.objects.write().insert(id.to_owned(), object);
    }

    /// Takes an object out.
    pub fn remove(&self, id: &str) -> Option<Arc<T>> {
        self.objects.write().remove(id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_may_be_abbreviated_while_they_are_unique() {
        let store = Store::default();
        for id in ["ab1", "ab2", "ab22", "c"] {
            store.insert(id, Arc::new(id.to_owned()));
        }
        let one = |id: &str| match store.find(id) {
            Found::One(object) => Some((*object).clone()),
            _ => None,
        };
        assert_eq!(one("ab1").as_deref(), Some("ab1"));
        assert_eq!(
            one("ab2").as_deref(),
            Some("ab2"),
            "an exact id wins over longer ones"
        );
        assert_eq!(one("c").as_deref(), Some("c"));
        assert!(matches!(store.find("ab"), Found::Many(3)));
        for absent in ["", "b", "ab3", "cc", "d"] {
            assert!(matches!(store.find(absent), Found::None), "{absent:?}");
        }
        assert!(store.remove("ab1").is_some());
        assert!(store.remove("ab1").is_none());
        assert_eq!(store.all().len(), 3);
    }
}
