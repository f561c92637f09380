// The order in which blocks take attention's units. It decides no number: what a unit computes depends on its column, its
// split and its heads alone.
//
// Columns of one request that follow each other read the same positions. So their units of one split stand side by side, and
// run at the same time on different blocks: memory is read once, and the others find it in L2. In the order of columns a
// long context would have left L2 before the next column asks for it.
#pragma once

struct Place { int column, split; };

// The n-th of all splits. `splits(c)`: how many a column has; `follows(c)`: whether it is the token behind that of column c - 1.
template <class Splits, class Follows> DEVICE Place place_of(int n, Splits splits, Follows follows) {
  int first = 0;   // columns [first, end) follow each other
  for (;;) {
    int end = first + 1, total = splits(first), least = total;
    for (; end < COLUMNS && follows(end); end++) {
      const int own = splits(end);
      total += own;
      least = own < least ? own : least;
    }
    if (n < total || end == COLUMNS) {
      const int width = end - first;
      int column = first, split = 0;
      if (n < least * width) {
        split = n / width;
        column = first + n % width;
      } else {   // a column further on has a split more, or, with windows, one before it
        n -= least * width;
        bool found = false;
        for (split = least; split < total && !found; split++)
          for (column = first; column < end && !found; column++) found = splits(column) > split && n-- == 0;
        split -= found;
        column -= found;
      }
      return Place{column, split};
    }
    n -= total;
    first = end;
  }
}
