//! The kernel side: object, pins, links, and what the kernel can do.

pub mod sys;
