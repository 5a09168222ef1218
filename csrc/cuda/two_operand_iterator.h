// An iterator over tiles along K that continues with a second operand where the first one ends.

#pragma once

#include <cutlass/cutlass.h>

namespace fila {

// `Base` is CUTLASS's iterator, which takes an operand's odd tile first: each operand's first tile may be short. After
// `turn` tiles, each but the last of both operands' to be followed by another, it is built anew over the second.
template <class Base>
struct TwoOperandIterator : Base {
  using Params = typename Base::Params;
  using Pointer = typename Base::Pointer;
  using TensorCoord = typename Base::TensorCoord;

  struct Operand {
    Params params;
    Pointer pointer;
    TensorCoord extent;
  };

  CUTLASS_DEVICE TwoOperandIterator(Operand const& first, Operand const& second, int turn, int thread,
                                    TensorCoord offset)
      : Base(first.params, first.pointer, first.extent, thread, offset),
        second(second),
        turn(turn),
        thread(thread),
        offset(offset) {}

  Operand const& second;
  int turn;  // tiles until then; 0: never
  int thread;
  TensorCoord offset;

  // One tile on, which is all that the main loop asks for. Not past the end of an operand without a second: what
  // CUTLASS rebuilds after its first tile would then be switched on again behind the main loop's back.
  CUTLASS_DEVICE void add_tile_offset(TensorCoord const& step) {
    if (--turn == 0) {
      static_cast<Base&>(*this) = Base(second.params, second.pointer, second.extent, thread, offset);
    } else {
      Base::add_tile_offset(step);
    }
  }
};

}  // namespace fila
