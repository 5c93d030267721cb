#include "lane.h"

#include <linux/futex.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstring>
#include <stdexcept>

namespace lockstep {
namespace {

constexpr int64_t SLICE_NS = 20'000'000;  // of sleep, between two looks at who is still there

int64_t now_ns() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec * 1'000'000'000LL + time.tv_nsec;
}

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// What was read is told on every way out, also when a message is not the one expected.
struct Commit {
  std::atomic<uint64_t>& told;
  const uint64_t& position;
  ~Commit() { told.store(position, std::memory_order_release); }
};

// The process behind a pidfd has ended, reaped or not.
bool ended(int process) {
  if (process < 0) return false;
  pollfd poll_one{process, POLLIN, 0};
  return poll(&poll_one, 1, 0) > 0;
}

// Copies between a buffer and a ring, at `position` bytes from its beginning of time.
size_t put(char* ring, size_t capacity, uint64_t position, const char* from, size_t bytes) {
  const size_t at = position % capacity, first = std::min(bytes, capacity - at);
  std::memcpy(ring + at, from, first);
  std::memcpy(ring, from + first, bytes - first);
  return bytes;
}

size_t take(const char* ring, size_t capacity, uint64_t position, char* to, size_t bytes) {
  const size_t at = position % capacity, first = std::min(bytes, capacity - at);
  std::memcpy(to, ring + at, first);
  std::memcpy(to + first, ring, bytes - first);
  return bytes;
}

}  // namespace

int64_t Lane::segment_bytes(int64_t size, int64_t ring) {
  return static_cast<int64_t>(sizeof(Doorbell)) +
         size * (static_cast<int64_t>(sizeof(RingEnds)) + ring);
}

Lane::Lane(int64_t rank, int64_t ring, int64_t spin_ns, const std::vector<int64_t>& segments,
           const std::vector<int64_t>& processes)
    : rank_(rank),
      size_(static_cast<int64_t>(segments.size())),
      ring_(ring),
      spin_ns_(spin_ns),
      bytes_(segment_bytes(size_, ring)) {
  for (const int64_t segment : segments) {
    void* at = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, static_cast<int>(segment), 0);
    if (at == MAP_FAILED) {
      for (char* mapped : mapped_) munmap(mapped, bytes_);
      throw std::runtime_error("cannot map a shared memory segment: " + std::string(strerror(errno)));
    }
    mapped_.push_back(static_cast<char*>(at));
  }
  const auto ends = [&](int64_t from, int64_t to) {
    return reinterpret_cast<RingEnds*>(mapped_[from] + sizeof(Doorbell)) + to;
  };
  const auto bytes = [&](int64_t from, int64_t to) {
    return mapped_[from] + sizeof(Doorbell) + size_ * sizeof(RingEnds) + to * ring_;
  };
  for (int64_t other = 0; other < size_; ++other) {
    Peer peer{};
    peer.bell = reinterpret_cast<Doorbell*>(mapped_[other]);
    peer.out = ends(rank_, other);
    peer.in = ends(other, rank_);
    peer.out_bytes = bytes(rank_, other);
    peer.in_bytes = bytes(other, rank_);
    peer.process = static_cast<int>(processes[other]);
    peers_.push_back(std::move(peer));
  }
}

Lane::~Lane() {
  leave();
  for (const Peer& peer : peers_)
    if (peer.process >= 0) close(peer.process);
  for (char* mapped : mapped_) munmap(mapped, bytes_);
}

int64_t Lane::start(uint32_t kind, const char* send, const std::vector<int64_t>& send_at,
                    const std::vector<int64_t>& send_bytes, char* into,
                    const std::vector<int64_t>& recv_bytes) {
  const int64_t number = next_++;
  char* place = into;
  for (int64_t rank = 0; rank < size_; ++rank) {
    char* from = const_cast<char*>(send) + send_at[rank];
    const size_t out = send_bytes[rank], in = recv_bytes[rank];
    if (rank == rank_) {
      if (in) std::memcpy(place, from, in);
    } else {
      const uint64_t counted = static_cast<uint64_t>(number);
      peers_[rank].sends.push_back({number, {counted, out, kind}, sizeof(Header), from, out});
      peers_[rank].receives.push_back({number, {counted, in, kind}, sizeof(Header), place, in});
    }
    place += in;
  }
  parts_left_[number] = 2 * (size_ - 1);
  for (Peer& peer : peers_)  // what comes is looked at by `wait`, which may find it wrong
    if (!peer.sends.empty() && advance_sends(peer)) ring_bell(peer);
  return number;
}

void Lane::wait(int64_t number, int64_t timeout_ns) {
  if (!parts_left_.count(number)) return;
  const int64_t begin = now_ns();
  int64_t last = begin;  // when something last moved
  while (parts_left_[number] > 0) {
    const uint32_t seen = peers_[rank_].bell->rings.load(std::memory_order_acquire);
    if (advance()) {
      last = now_ns();
      continue;
    }
    const int64_t now = now_ns();
    if (now - last < spin_ns_) {
      for (int i = 0; i < 32; ++i) pause();
      continue;
    }
    refuse_the_gone(number);
    if (now - begin > timeout_ns)
      throw std::runtime_error("timed out after " + std::to_string((now - begin) / 1'000'000) +
                               " ms; nothing came from rank " + missing(number) + " of the group");
    sleep(seen);
  }
  parts_left_.erase(number);
}

void Lane::leave() {
  peers_[rank_].bell->left.store(1, std::memory_order_seq_cst);
  for (int64_t rank = 0; rank < size_; ++rank)
    if (rank != rank_) ring_bell(peers_[rank]);
}

bool Lane::advance() {
  bool moved = false;
  for (int64_t rank = 0; rank < size_; ++rank) {
    if (rank == rank_) continue;
    Peer& peer = peers_[rank];
    const bool sent = !peer.sends.empty() && advance_sends(peer);
    const bool received = !peer.receives.empty() && advance_receives(rank, peer);
    if (sent || received) ring_bell(peer);
    moved |= sent || received;
  }
  return moved;
}

bool Lane::advance_sends(Peer& peer) {
  const uint64_t before = peer.out->written.load(std::memory_order_relaxed);
  uint64_t written = before;
  uint64_t room = ring_ - (written - peer.out->read.load(std::memory_order_acquire));
  while (!peer.sends.empty()) {
    Part& part = peer.sends.front();
    if (part.header_left) {
      if (room < sizeof(Header)) break;
      room -= sizeof(Header);
      written += put(peer.out_bytes, ring_, written, reinterpret_cast<char*>(&part.header),
                     sizeof(Header));
      part.header_left = 0;
    }
    const size_t bytes = std::min<size_t>(room, part.left);
    if (bytes) written += put(peer.out_bytes, ring_, written, part.payload, bytes);
    room -= bytes;
    if (!moved(peer.sends, bytes)) break;
  }
  peer.out->written.store(written, std::memory_order_release);
  return written != before;
}

bool Lane::advance_receives(int64_t rank, Peer& peer) {
  const uint64_t before = peer.in->read.load(std::memory_order_relaxed);
  uint64_t read = before;
  const Commit commit{peer.in->read, read};
  uint64_t there = peer.in->written.load(std::memory_order_acquire) - read;
  while (!peer.receives.empty()) {
    Part& part = peer.receives.front();
    if (part.header_left) {
      if (there < sizeof(Header)) break;
      Header got;
      take(peer.in_bytes, ring_, read, reinterpret_cast<char*>(&got), sizeof(Header));
      check(rank, part, got);  // before it is taken out: asked again, it throws again
      read += sizeof(Header);
      there -= sizeof(Header);
      part.header_left = 0;
    }
    const size_t bytes = std::min<size_t>(there, part.left);
    if (bytes) read += take(peer.in_bytes, ring_, read, part.payload, bytes);
    there -= bytes;
    if (!moved(peer.receives, bytes)) break;
  }
  return read != before;
}

void Lane::check(int64_t rank, const Part& expected, const Header& got) {
  const Header& own = expected.header;
  if (got.number == own.number && got.kind == own.kind && got.bytes == own.bytes) return;
  const auto told = [](const Header& header) {
    return "collective " + std::to_string(header.number) + " of kind " +
           std::to_string(header.kind) + " with " + std::to_string(header.bytes) + " bytes";
  };
  throw std::runtime_error("rank " + std::to_string(rank) + " of the group sent " + told(got) +
                           ", expected was " + told(own) +
                           ": the ranks do not call the same collectives");
}

// Counts `bytes` of the first part as moved; true when it is complete and the next may begin.
bool Lane::moved(std::deque<Part>& parts, size_t bytes) {
  Part& part = parts.front();
  part.payload += bytes;
  part.left -= bytes;
  if (part.left) return false;
  --parts_left_.at(part.number);
  parts.pop_front();
  return true;
}

void Lane::ring_bell(Peer& peer) {
  peer.bell->rings.fetch_add(1, std::memory_order_seq_cst);
  if (peer.bell->asleep.load(std::memory_order_seq_cst))
    syscall(SYS_futex, &peer.bell->rings, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

void Lane::sleep(uint32_t seen) {
  Doorbell& bell = *peers_[rank_].bell;
  bell.asleep.store(1, std::memory_order_seq_cst);
  const timespec slice{0, SLICE_NS};
  syscall(SYS_futex, &bell.rings, FUTEX_WAIT, seen, &slice, nullptr, 0);
  bell.asleep.store(0, std::memory_order_relaxed);
}

// Whether collective `number` cannot be completed without this rank.
bool Lane::needs(const Peer& peer, int64_t number) const {
  return (!peer.sends.empty() && peer.sends.front().number <= number) ||
         (!peer.receives.empty() && peer.receives.front().number <= number);
}

std::string Lane::missing(int64_t number) const {
  std::string names;
  for (int64_t rank = 0; rank < size_; ++rank) {
    if (!needs(peers_[rank], number)) continue;
    names += (names.empty() ? "" : ", ") + std::to_string(rank);
  }
  return names;
}

// Nothing moves: whoever has left or ended will not move again.
void Lane::refuse_the_gone(int64_t number) {
  for (int64_t rank = 0; rank < size_; ++rank) {
    const Peer& peer = peers_[rank];
    if (!needs(peer, number) || !(peer.bell->left.load(std::memory_order_acquire) || ended(peer.process)))
      continue;
    // It may have written all it had to before it went.
    if (advance()) return;
    throw std::runtime_error("connection closed by rank " + std::to_string(rank) +
                             " of the group, which has left or ended");
  }
}

}  // namespace lockstep
