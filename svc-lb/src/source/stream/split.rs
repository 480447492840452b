//! Finds the JSON objects in a stream of bytes, as they come, and where one is not JSON.
//!
//! Every byte is looked at once. What is found is well-formed as far as brackets, strings,
//! commas and colons go; the rest is for the parser.

/// The longest value that is kept: a list of a large cluster is about half of it.
pub(super) const MAX_VALUE: usize = 64 << 20;
/// Deeper values are refused, as by the parser.
const MAX_DEPTH: usize = 128;

/// What is found.
#[derive(Debug, Eq, PartialEq)]
pub(super) enum Piece {
    /// An object, from `{` to `}`.
    Value {
        /// Position of its first byte in the stream.
        offset: u64,
        /// It.
        text: Vec<u8>,
    },
    /// Something else, which is skipped up to the next `{`.
    Malformed {
        /// Position of the first byte that is wrong.
        offset: u64,
        /// What is wrong with it.
        problem: &'static str,
    },
}

/// Splits one stream.
#[derive(Debug)]
pub(super) struct Splitter {
    buffer: Vec<u8>,
    /// Position of the buffer's first byte in the stream.
    offset: u64,
    /// Where in the buffer the current value begins.
    begin: usize,
    /// What comes from here on was not looked at yet.
    looked_at: usize,
    inside: Inside,
    max_value: usize,
}

/// Where in the stream we are.
#[derive(Debug)]
enum Inside {
    /// Between values.
    Gap,
    /// In a value.
    Value(Machine),
    /// In a value that is too long to be kept.
    TooLong(Machine),
    /// After something that was not JSON.
    Garbage,
}

impl Splitter {
    pub(super) fn new(max_value: usize) -> Self {
        Self {
            buffer: Vec::new(),
            offset: 0,
            begin: 0,
            looked_at: 0,
            inside: Inside::Gap,
            max_value,
        }
    }

    /// Takes the next bytes.
    pub(super) fn feed(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next thing in what has come so far.
    pub(super) fn next_piece(&mut self) -> Option<Piece> {
        while let Some(byte) = self.buffer.get(self.looked_at).copied() {
            if let Some(piece) = self.look_at(byte) {
                return Some(piece);
            }
        }
        let needed = if matches!(self.inside, Inside::Value(_)) {
            self.begin
        } else {
            self.looked_at
        };
        self.buffer.drain(..needed);
        self.buffer.shrink_to(1 << 20);
        self.offset += needed as u64;
        self.begin = 0;
        self.looked_at -= needed;
        None
    }

    /// The last value made no sense: what follows it is no more to be trusted than what follows
    /// something malformed.
    pub(super) fn distrust(&mut self) {
        if matches!(self.inside, Inside::Gap) {
            self.inside = Inside::Garbage;
        }
    }

    /// The stream has ended; what follows is another one.
    pub(super) fn end(&mut self) -> Option<Piece> {
        let cut = matches!(self.inside, Inside::Value(_) | Inside::TooLong(_));
        let offset = self.position();
        *self = Self::new(self.max_value);
        cut.then_some(Piece::Malformed {
            offset,
            problem: "the stream ended inside an object",
        })
    }

    /// Of the byte to look at next.
    fn position(&self) -> u64 {
        self.offset + self.looked_at as u64
    }

    fn look_at(&mut self, byte: u8) -> Option<Piece> {
        match &mut self.inside {
            Inside::Gap | Inside::Garbage if byte == b'{' => {
                self.begin = self.looked_at;
                self.looked_at += 1;
                self.inside = Inside::Value(Machine::in_object());
                None
            }
            Inside::Gap if !byte.is_ascii_whitespace() => {
                let offset = self.position();
                self.looked_at += 1;
                self.inside = Inside::Garbage;
                Some(Piece::Malformed {
                    offset,
                    problem: "expected a JSON object",
                })
            }
            Inside::Gap | Inside::Garbage => {
                self.looked_at += 1;
                None
            }
            Inside::Value(machine) => match machine.step(byte) {
                Step::More => self.grow(),
                Step::Done => {
                    self.looked_at += 1;
                    self.inside = Inside::Gap;
                    let text = self
                        .buffer
                        .get(self.begin..self.looked_at)
                        .unwrap_or_default();
                    let offset = self.offset + self.begin as u64;
                    Some(Piece::Value {
                        offset,
                        text: text.to_vec(),
                    })
                }
                Step::Wrong(problem) => Some(self.wrong(problem)),
            },
            Inside::TooLong(machine) => match machine.step(byte) {
                Step::More => {
                    self.looked_at += 1;
                    None
                }
                Step::Done => {
                    self.looked_at += 1;
                    self.inside = Inside::Gap;
                    None
                }
                Step::Wrong(problem) => Some(self.wrong(problem)),
            },
        }
    }

    fn grow(&mut self) -> Option<Piece> {
        self.looked_at += 1;
        if self.looked_at - self.begin < self.max_value {
            return None;
        }
        if let Inside::Value(machine) = std::mem::replace(&mut self.inside, Inside::Garbage) {
            self.inside = Inside::TooLong(machine);
        }
        let offset = self.offset + self.begin as u64;
        Some(Piece::Malformed {
            offset,
            problem: "the object is too long",
        })
    }

    /// The byte itself may begin the next value, so it is looked at again.
    fn wrong(&mut self, problem: &'static str) -> Piece {
        let offset = self.position();
        self.inside = Inside::Garbage;
        Piece::Malformed { offset, problem }
    }
}

/// What a byte does to a value.
#[derive(Debug)]
enum Step {
    More,
    Done,
    Wrong(&'static str),
}

/// JSON's grammar, byte by byte.
#[derive(Debug)]
struct Machine {
    /// The brackets that are open; true for an object.
    open: Vec<bool>,
    expect: Expect,
}

/// What may come next.
#[derive(Clone, Copy, Debug)]
enum Expect {
    Value,
    ValueOrEnd,
    KeyOrEnd,
    Key,
    Colon,
    CommaOrEnd,
    /// Inside a string that is a key or not; after a backslash or not; with hexadecimal digits
    /// still to come.
    Text {
        key: bool,
        escaped: bool,
        digits: u8,
    },
    /// Inside a number.
    Number,
    /// The rest of `true`, `false` or `null`.
    Literal(&'static [u8]),
}

impl Machine {
    /// After the `{` that begins a value.
    fn in_object() -> Self {
        Self {
            open: vec![true],
            expect: Expect::KeyOrEnd,
        }
    }

    fn step(&mut self, byte: u8) -> Step {
        match self.expect {
            Expect::Text {
                key,
                escaped,
                digits,
            } => self.in_text(byte, key, escaped, digits),
            Expect::Literal([first, rest @ ..]) => {
                if byte != *first {
                    return Step::Wrong("expected true, false or null");
                }
                self.expect = Expect::Literal(rest);
                Step::More
            }
            Expect::Number if matches!(byte, b'0'..=b'9' | b'+' | b'-' | b'.' | b'e' | b'E') => {
                Step::More
            }
            Expect::Literal([]) | Expect::Number | Expect::CommaOrEnd => self.after_value(byte),
            _ if byte.is_ascii_whitespace() => Step::More,
            Expect::Colon => self.only(byte, b':', Expect::Value, "expected ':'"),
            Expect::KeyOrEnd if byte == b'}' => self.close(true),
            Expect::ValueOrEnd if byte == b']' => self.close(false),
            Expect::Key | Expect::KeyOrEnd => {
                let text = Expect::Text {
                    key: true,
                    escaped: false,
                    digits: 0,
                };
                self.only(byte, b'"', text, "expected a key in quotes")
            }
            Expect::Value | Expect::ValueOrEnd => self.value(byte),
        }
    }

    fn only(&mut self, byte: u8, wanted: u8, then: Expect, problem: &'static str) -> Step {
        if byte != wanted {
            return Step::Wrong(problem);
        }
        self.expect = then;
        Step::More
    }

    fn value(&mut self, byte: u8) -> Step {
        self.expect = match byte {
            b'{' | b'[' => return self.open(byte == b'{'),
            b'"' => Expect::Text {
                key: false,
                escaped: false,
                digits: 0,
            },
            b'-' | b'0'..=b'9' => Expect::Number,
            b't' => Expect::Literal(b"rue"),
            b'f' => Expect::Literal(b"alse"),
            b'n' => Expect::Literal(b"ull"),
            _ => return Step::Wrong("expected a value"),
        };
        Step::More
    }

    fn open(&mut self, object: bool) -> Step {
        if self.open.len() >= MAX_DEPTH {
            return Step::Wrong("nested too deeply");
        }
        self.open.push(object);
        self.expect = if object {
            Expect::KeyOrEnd
        } else {
            Expect::ValueOrEnd
        };
        Step::More
    }

    fn close(&mut self, object: bool) -> Step {
        if self.open.pop() != Some(object) {
            return Step::Wrong("brackets do not match");
        }
        self.expect = Expect::CommaOrEnd;
        if self.open.is_empty() {
            Step::Done
        } else {
            Step::More
        }
    }

    fn after_value(&mut self, byte: u8) -> Step {
        let in_object = self.open.last() == Some(&true);
        self.expect = match byte {
            b',' if in_object => Expect::Key,
            b',' => Expect::Value,
            b'}' => return self.close(true),
            b']' => return self.close(false),
            _ if byte.is_ascii_whitespace() => Expect::CommaOrEnd,
            _ => return Step::Wrong("expected ',' or a closing bracket"),
        };
        Step::More
    }

    fn in_text(&mut self, byte: u8, key: bool, escaped: bool, digits: u8) -> Step {
        let text = |escaped, digits| Expect::Text {
            key,
            escaped,
            digits,
        };
        self.expect = match (byte, escaped, digits) {
            (b'0'..=b'9' | b'a'..=b'f' | b'A'..=b'F', _, 1..) => text(false, digits - 1),
            (_, _, 1..) => return Step::Wrong("expected a hexadecimal digit"),
            (b'u', true, 0) => text(false, 4),
            (b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't', true, 0) => text(false, 0),
            (_, true, 0) => return Step::Wrong("unknown escape"),
            (b'\\', false, 0) => text(true, 0),
            (b'"', false, 0) if key => Expect::Colon,
            (b'"', false, 0) => Expect::CommaOrEnd,
            (0..0x20, false, 0) => return Step::Wrong("control character in a string"),
            (_, false, 0) => text(false, 0),
        };
        Step::More
    }
}
