//! A YAML document as a tree that knows its lines, and typed objects out of it.
//!
//! Errors name line and field; fields that the type does not have are collected.

use std::{cell::RefCell, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{
        self, DeserializeSeed, Error as _, IntoDeserializer as _, MapAccess, SeqAccess, Unexpected,
        Visitor, value::StrDeserializer,
    },
    forward_to_deserialize_any,
};
use serde_saphyr::Spanned;

/// A value and the line it begins on, counted from 1.
#[derive(Debug)]
pub(crate) struct Located {
    pub(crate) line: u64,
    value: Value,
}

#[derive(Debug)]
enum Value {
    Null,
    Bool(bool),
    Signed(i64),
    Unsigned(u64),
    Float(f64),
    Text(String),
    List(Vec<Located>),
    Map(Vec<Entry>),
}

#[derive(Debug)]
struct Entry {
    key: String,
    /// Line of the key.
    line: u64,
    value: Located,
}

impl Located {
    /// The value of a field of a mapping.
    pub(crate) fn get(&self, key: &str) -> Option<&Self> {
        let Value::Map(entries) = &self.value else {
            return None;
        };
        entries
            .iter()
            .find(|entry| entry.key == key)
            .map(|entry| &entry.value)
    }

    /// The text of a field of a mapping.
    pub(crate) fn text(&self, key: &str) -> Option<&str> {
        match &self.get(key)?.value {
            Value::Text(text) => Some(text),
            Value::Null
            | Value::Bool(_)
            | Value::Signed(_)
            | Value::Unsigned(_)
            | Value::Float(_)
            | Value::List(_)
            | Value::Map(_) => None,
        }
    }

    /// Nothing is there.
    pub(crate) fn is_null(&self) -> bool {
        matches!(self.value, Value::Null)
    }

    /// The fields of a mapping, with the lines of their keys.
    pub(crate) fn fields(&self) -> Option<impl Iterator<Item = (&str, u64, &Self)>> {
        let Value::Map(entries) = &self.value else {
            return None;
        };
        Some(
            entries
                .iter()
                .map(|entry| (entry.key.as_str(), entry.line, &entry.value)),
        )
    }

    /// A scalar's text, or the texts of a list of scalars; none of null.
    pub(crate) fn scalars(&self) -> Option<Vec<String>> {
        match &self.value {
            Value::Null => Some(Vec::new()),
            Value::Bool(value) => Some(vec![value.to_string()]),
            Value::Text(text) => Some(vec![text.clone()]),
            Value::Signed(_) | Value::Unsigned(_) | Value::Float(_) => {
                self.number().map(|n| vec![n])
            }
            Value::List(items) => {
                let lists: Option<Vec<Vec<String>>> = items.iter().map(Self::scalars).collect();
                lists.map(|lists| lists.into_iter().flatten().collect())
            }
            Value::Map(_) => None,
        }
    }

    /// The elements of a field that is a list; none of a field that is not there.
    pub(crate) fn list(&self, key: &str) -> &[Self] {
        match self.get(key).map(|located| &located.value) {
            Some(Value::List(items)) => items,
            _ => &[],
        }
    }

    /// The line of a field given as `a.b[0].c`, or of as much of it as there is.
    pub(crate) fn line_of(&self, field: &str) -> u64 {
        let mut at = self;
        let mut line = self.line;
        for step in field.split(['.', '[']) {
            let next = match (step.strip_suffix(']'), &at.value) {
                (Some(index), Value::List(items)) => index
                    .parse()
                    .ok()
                    .and_then(|i: usize| items.get(i))
                    .map(|item| (item, item.line)),
                (None, Value::Map(entries)) => entries
                    .iter()
                    .find(|entry| entry.key == step)
                    .map(|entry| (&entry.value, entry.line)),
                _ => None,
            };
            let Some((next, next_line)) = next else { break };
            (at, line) = (next, next_line);
        }
        line
    }

    /// Lets typed objects be read from here; `unknown` gets the fields that their types lack.
    pub(crate) fn reader<'a>(&'a self, unknown: &'a RefCell<Vec<Unknown>>) -> Cursor<'a, 'a> {
        Cursor {
            at: self,
            path: &Path::Root,
            unknown,
        }
    }

    /// A number as text.
    fn number(&self) -> Option<String> {
        match &self.value {
            Value::Signed(value) => Some(value.to_string()),
            Value::Unsigned(value) => Some(value.to_string()),
            Value::Float(value) => Some(value.to_string()),
            Value::Null | Value::Bool(_) | Value::Text(_) | Value::List(_) | Value::Map(_) => None,
        }
    }

    fn unexpected(&self) -> Unexpected<'_> {
        match &self.value {
            Value::Null => Unexpected::Unit,
            Value::Bool(value) => Unexpected::Bool(*value),
            Value::Signed(value) => Unexpected::Signed(*value),
            Value::Unsigned(value) => Unexpected::Unsigned(*value),
            Value::Float(value) => Unexpected::Float(*value),
            Value::Text(value) => Unexpected::Str(value),
            Value::List(_) => Unexpected::Seq,
            Value::Map(_) => Unexpected::Map,
        }
    }
}

impl<'de> Deserialize<'de> for Located {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Value>::deserialize(deserializer)?;
        Ok(Self {
            line: spanned.referenced.line(),
            value: spanned.value,
        })
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        Value::deserialize(deserializer)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Signed(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(i64::try_from(value).map_or(Value::Unsigned(value), Value::Signed))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Float(value))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::Text(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::Text(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(Value::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(key) = map.next_key::<Spanned<String>>()? {
            let line = key.referenced.line();
            entries.push(Entry {
                key: key.value,
                line,
                value: map.next_value()?,
            });
        }
        Ok(Value::Map(entries))
    }
}

/// A field that its type does not have.
#[derive(Debug)]
pub(crate) struct Unknown {
    pub(crate) line: u64,
    /// Path from the object's root.
    pub(crate) field: String,
    /// The field that was probably meant.
    pub(crate) meant: Option<&'static str>,
}

/// A value that is not what its type wants.
#[derive(Debug)]
pub(crate) struct Mismatch {
    pub(crate) line: u64,
    /// Path from the object's root; empty for the object itself.
    pub(crate) field: String,
    pub(crate) problem: String,
}

impl Mismatch {
    /// Keeps the innermost place.
    fn at(mut self, line: u64, path: &Path<'_>) -> Self {
        if self.line == 0 {
            self.line = line;
            self.field = path.to_string();
        }
        self
    }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.problem)
    }
}

impl std::error::Error for Mismatch {}

impl de::Error for Mismatch {
    fn custom<T: fmt::Display>(problem: T) -> Self {
        Self {
            line: 0,
            field: String::new(),
            problem: problem.to_string(),
        }
    }
}

/// The way from the root to a value.
pub(crate) enum Path<'a> {
    Root,
    Field(&'a Path<'a>, &'a str),
    Index(&'a Path<'a>, usize),
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Root => Ok(()),
            Self::Field(Self::Root, key) => f.write_str(key),
            Self::Field(parent, key) => write!(f, "{parent}.{key}"),
            Self::Index(parent, index) => write!(f, "{parent}[{index}]"),
        }
    }
}

/// A serde deserializer at one value.
#[derive(Clone, Copy)]
pub(crate) struct Cursor<'a, 'p> {
    at: &'a Located,
    path: &'p Path<'p>,
    unknown: &'p RefCell<Vec<Unknown>>,
}

impl<'a> Cursor<'a, '_> {
    fn visit<V: Visitor<'a>>(self, visitor: V) -> Result<V::Value, Mismatch> {
        match &self.at.value {
            Value::Null => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::Signed(value) => visitor.visit_i64(*value),
            Value::Unsigned(value) => visitor.visit_u64(*value),
            Value::Float(value) => visitor.visit_f64(*value),
            Value::Text(value) => visitor.visit_borrowed_str(value),
            Value::List(items) => visitor.visit_seq(Items {
                cursor: self,
                rest: items.iter().enumerate(),
            }),
            Value::Map(entries) => visitor.visit_map(Entries {
                cursor: self,
                rest: entries.iter(),
                value: None,
            }),
        }
    }

    fn note_unknown(self, fields: &'static [&'static str]) {
        let Value::Map(entries) = &self.at.value else {
            return;
        };
        for entry in entries
            .iter()
            .filter(|entry| !fields.contains(&entry.key.as_str()))
        {
            self.unknown.borrow_mut().push(Unknown {
                line: entry.line,
                field: Path::Field(self.path, &entry.key).to_string(),
                meant: closest(&entry.key, fields),
            });
        }
    }
}

/// The field that a misspelt one is most like, if it is like any.
pub(crate) fn closest<'a>(found: &str, known: &[&'a str]) -> Option<&'a str> {
    let found = found.to_lowercase();
    let likeness = |name: &str| strsim::jaro_winkler(&found, &name.to_lowercase());
    let best = known
        .iter()
        .max_by(|a, b| likeness(a).total_cmp(&likeness(b)))?;
    (likeness(best) > 0.85).then_some(*best)
}

impl<'de> Deserializer<'de> for Cursor<'de, '_> {
    type Error = Mismatch;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Mismatch> {
        self.visit(visitor)
            .map_err(|e| e.at(self.at.line, self.path))
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Mismatch> {
        if matches!(self.at.value, Value::Null) {
            return visitor.visit_none();
        }
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        visitor: V,
    ) -> Result<V::Value, Mismatch> {
        // `cpu: 2` is as good a quantity as `cpu: "2"`.
        let number = self.at.number().filter(|_| name == "Quantity");
        let Some(number) = number else {
            return visitor.visit_newtype_struct(self);
        };
        let text: StrDeserializer<'_, Mismatch> = number.as_str().into_deserializer();
        visitor
            .visit_newtype_struct(text)
            .map_err(|e| e.at(self.at.line, self.path))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Mismatch> {
        if !matches!(self.at.value, Value::Map(_)) {
            let error = Mismatch::invalid_type(self.at.unexpected(), &name);
            return Err(error.at(self.at.line, self.path));
        }
        self.note_unknown(fields);
        self.deserialize_any(visitor)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit
        unit_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

struct Items<'a, 'p> {
    cursor: Cursor<'a, 'p>,
    rest: std::iter::Enumerate<std::slice::Iter<'a, Located>>,
}

impl<'a> SeqAccess<'a> for Items<'a, '_> {
    type Error = Mismatch;

    fn next_element_seed<T: DeserializeSeed<'a>>(
        &mut self,
        seed: T,
    ) -> Result<Option<T::Value>, Mismatch> {
        let Some((index, at)) = self.rest.next() else {
            return Ok(None);
        };
        let path = Path::Index(self.cursor.path, index);
        seed.deserialize(Cursor {
            at,
            path: &path,
            unknown: self.cursor.unknown,
        })
        .map(Some)
    }
}

struct Entries<'a, 'p> {
    cursor: Cursor<'a, 'p>,
    rest: std::slice::Iter<'a, Entry>,
    value: Option<&'a Entry>,
}

impl<'a> MapAccess<'a> for Entries<'a, '_> {
    type Error = Mismatch;

    fn next_key_seed<K: DeserializeSeed<'a>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Mismatch> {
        self.value = self.rest.next();
        let Some(entry) = self.value else {
            return Ok(None);
        };
        let key: StrDeserializer<'_, Mismatch> = entry.key.as_str().into_deserializer();
        seed.deserialize(key).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'a>>(&mut self, seed: V) -> Result<V::Value, Mismatch> {
        let Some(entry) = self.value.take() else {
            return Err(Mismatch::custom("a value was asked for before its key"));
        };
        let path = Path::Field(self.cursor.path, &entry.key);
        seed.deserialize(Cursor {
            at: &entry.value,
            path: &path,
            unknown: self.cursor.unknown,
        })
    }
}
