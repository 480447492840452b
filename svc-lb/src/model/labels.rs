//! Labels and selectors.

/// Keys and values, sorted by key: a map in a tenth of a map's memory.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Labels(Box<[(Box<str>, Box<str>)]>);

impl Labels {
    /// There are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The value of a key.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        let at = self.0.binary_search_by(|(k, _)| (**k).cmp(key)).ok()?;
        self.0.get(at).map(|(_, value)| &**value)
    }

    /// Keys and values, by key.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(key, value)| (&**key, &**value))
    }

    /// Everything that `selector` names is here too.
    #[must_use]
    pub fn match_all_of(&self, selector: &Self) -> bool {
        selector
            .iter()
            .all(|(key, value)| self.get(key) == Some(value))
    }
}

impl<K: Into<Box<str>>, V: Into<Box<str>>> FromIterator<(K, V)> for Labels {
    /// The last one of equal keys stands.
    fn from_iter<I: IntoIterator<Item = (K, V)>>(pairs: I) -> Self {
        let pairs = pairs
            .into_iter()
            .map(|(key, value)| (key.into(), value.into()));
        let sorted: std::collections::BTreeMap<Box<str>, Box<str>> = pairs.collect();
        Self(sorted.into_iter().collect())
    }
}
