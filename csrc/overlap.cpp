#include "overlap.h"

#include <algorithm>
#include <array>
#include <tuple>

namespace fastopt {
namespace {

// Calls visit(table, place, span, written) for every tensor of every slot that has elements.
template <class Visit>
void for_each_span(const std::vector<Table>& tables, bool writes_grad, Visit visit) {
  for (size_t t = 0; t < tables.size(); ++t) {
    const Table& table = tables[t];
    for (size_t i = 0; i < table.slots.size(); ++i) {
      const Slot& slot = table.slots[i];
      for (int tensor = 0; slot.numel > 0 && tensor < table.tensors(); ++tensor) {
        if (tensor == kGrad && slot.data[kGrad] == slot.data[kParam]) continue;  // to be clipped
        visit(t, i, span_of(table, slot, tensor), tensor != kGrad || writes_grad);
      }
      // The CPU counts one after another.
      const int counts = table.device.device_type == kDLCPU ? 0 : table.counts;
      for (int j = 0; j < counts; ++j) visit(t, i, span_of(table, slot, count_place(j)), true);
    }
  }
}

// By address. A step has thousands of spans, which comparing would take several times as long for:
// digits put them in the order of their cache lines, and mostly no line has two.
void sort(std::vector<Span>& spans) {
  constexpr int kLine = 6, kDigit = 11;
  uintptr_t differ = 0;
  for (const Span& span : spans) differ |= span.begin ^ spans[0].begin;
  std::vector<Span> sorted(spans.size());
  for (int shift = kLine; shift < 64 && differ >> shift; shift += kDigit) {
    std::array<uint32_t, 1 << kDigit> ends{};
    const auto digit = [&](const Span& s) { return (s.begin >> shift) & ((1 << kDigit) - 1); };
    for (const Span& span : spans) ++ends[digit(span)];
    uint32_t end = 0;
    for (uint32_t& count : ends) count = end += count;
    for (auto span = spans.rbegin(); span != spans.rend(); ++span) {
      sorted[--ends[digit(*span)]] = *span;
    }
    spans.swap(sorted);
  }
  for (size_t i = 1; i < spans.size(); ++i) {
    for (size_t j = i; j > 0 && spans[j].begin < spans[j - 1].begin; --j) {
      std::swap(spans[j], spans[j - 1]);
    }
  }
}

bool any_meet(const std::vector<Table>& tables, bool writes_grad) {
  std::vector<Span> spans;
  for (const Table& table : tables) {
    spans.reserve(spans.size() + table.slots.size() * kMaxPlaces);
  }
  for_each_span(tables, writes_grad,
                [&](size_t, size_t, Span span, bool) { spans.push_back(span); });
  sort(spans);
  for (size_t i = 1; i < spans.size(); ++i) {
    if (spans[i - 1].end > spans[i].begin) return true;
  }
  return false;
}

// A member's turn is the first after those of all members before it that it shares memory with.
std::vector<int> turns_of(const std::vector<Table>& tables, bool writes_grad) {
  struct Piece {
    Span span;
    int32_t member;
    bool written;
  };
  std::vector<Piece> pieces;
  int32_t members = 0;
  for_each_span(tables, writes_grad, [&](size_t table, size_t slot, Span span, bool written) {
    pieces.push_back({span, tables[table].members[slot], written});
    members = std::max(members, pieces.back().member + 1);
  });
  std::sort(pieces.begin(), pieces.end(),
            [](const Piece& a, const Piece& b) { return a.span.begin < b.span.begin; });

  std::vector<std::vector<int32_t>> before(members);
  std::vector<const Piece*> open;  // those before a piece that may reach into it
  for (const Piece& piece : pieces) {
    open.erase(std::remove_if(open.begin(), open.end(),
                              [&](const Piece* o) { return o->span.end <= piece.span.begin; }),
               open.end());
    for (const Piece* other : open) {
      if (other->member == piece.member || !(other->written || piece.written)) continue;
      const auto [first, second] = std::minmax(other->member, piece.member);
      before[second].push_back(first);
    }
    open.push_back(&piece);
  }
  std::vector<int> turns(members);
  for (int32_t member = 0; member < members; ++member) {
    for (const int32_t other : before[member]) {
      turns[member] = std::max(turns[member], turns[other] + 1);
    }
  }
  return turns;
}

}  // namespace

std::vector<Table> in_turn(std::vector<Table> tables, bool writes_grad) {
  if (!any_meet(tables, writes_grad)) return tables;
  const std::vector<int> turns = turns_of(tables, writes_grad);
  const int last = *std::max_element(turns.begin(), turns.end());
  std::vector<Table> divided;
  for (int turn = 0; turn <= last; ++turn) {
    for (const Table& table : tables) {
      Table part{};
      part.device = table.device;
      part.states = table.states;
      part.counts = table.counts;
      std::copy(std::begin(table.format), std::end(table.format), part.format);
      for (size_t i = 0; i < table.slots.size(); ++i) {
        const Slot& slot = table.slots[i];
        if (turns[table.members[i]] != turn) continue;
        const bool dense = slot.layout == kDense;
        append_slot(part, slot, table.members[i], dense ? nullptr : &table.layouts[slot.layout]);
      }
      if (!part.slots.empty()) divided.push_back(std::move(part));
    }
  }
  return divided;
}

}  // namespace fastopt
