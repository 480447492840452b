//! The one way to declare a record that crosses between kernel and agent.

/// Declares `#[repr(C)]` records and proves at compile time that they have the stated size, no
/// hidden padding (the sizes of the fields add up), and an alignment of at most 8.
///
/// Generic records (`name<A>`) are proved for both address families. With the feature `user`
/// they implement `aya::Pod`.
macro_rules! record {
    (
        $(#[$meta:meta])*
        pub struct $name:ident = $size:literal {
            $( $(#[$fmeta:meta])* pub $field:ident: $ty:ty, )*
        }
    ) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Eq, PartialEq)]
        #[cfg_attr(feature = "user", derive(Debug))]
        pub struct $name { $( $(#[$fmeta])* pub $field: $ty, )* }

        const _: () = {
            assert!(size_of::<$name>() == $size);
            assert!($size == 0 $( + size_of::<$ty>() )*, "hidden padding");
            assert!(align_of::<$name>() <= 8);
        };

        // SAFETY: repr(C), plain integers and arrays of them, no padding (asserted above).
        #[cfg(feature = "user")]
        unsafe impl aya::Pod for $name {}
    };
    (
        $(#[$meta:meta])*
        pub struct $name:ident<A> = ($size4:literal, $size6:literal) {
            $( $(#[$fmeta:meta])* pub $field:ident: $ty:ty, )*
        }
    ) => {
        $(#[$meta])*
        #[repr(C)]
        #[derive(Clone, Copy, Eq, PartialEq)]
        #[cfg_attr(feature = "user", derive(Debug))]
        pub struct $name<A: $crate::Address> { $( $(#[$fmeta])* pub $field: $ty, )* }

        const _: () = {
            const fn prove<A: $crate::Address>(size: usize) {
                assert!(size_of::<$name<A>>() == size);
                assert!(size == 0 $( + size_of::<$ty>() )*, "hidden padding");
                assert!(align_of::<$name<A>>() <= 8);
            }
            prove::<$crate::Addr4>($size4);
            prove::<$crate::Addr6>($size6);
        };

        // SAFETY: repr(C), plain integers and arrays of them, no padding (asserted above).
        #[cfg(feature = "user")]
        unsafe impl aya::Pod for $name<$crate::Addr4> {}
        // SAFETY: as above.
        #[cfg(feature = "user")]
        unsafe impl aya::Pod for $name<$crate::Addr6> {}
    };
}

pub(crate) use record;
