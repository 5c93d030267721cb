// Shared memory between the ranks of one host: a stream of bytes for each ordered pair of ranks.
//
// Rank i's segment holds what i writes: for each rank j a ring that only i fills and only j empties,
// and i's doorbell, which others ring when they have given i something to do. A collective is a
// message to and from every rank, with a header that says which collective it belongs to: a rank
// that has skipped one is found out by the first message that is not the one expected.
//
//     segment i   [ doorbell | ends of rings i -> 0 .. W - 1 | bytes of the rings ]
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <string>
#include <vector>

namespace lockstep {

struct alignas(64) Doorbell {
  std::atomic<uint32_t> rings;   // grows when somebody has written to this rank or read from it
  std::atomic<uint32_t> asleep;  // 1 while this rank's thread sleeps until it rings
  std::atomic<uint32_t> left;    // 1 once this rank takes part no more
};

// Bytes ever written and read; their difference is what is in the ring.
struct RingEnds {
  alignas(64) std::atomic<uint64_t> written;
  alignas(64) std::atomic<uint64_t> read;
};

struct Header {
  uint64_t number;  // of the collective, counted by each rank
  uint64_t bytes;   // of the payload
  uint32_t kind;    // what is called: two ranks must call the same
  uint32_t unused = 0;
};

// One rank's end of a group. Not for two threads at once.
class Lane {
 public:
  // Bytes of one rank's segment in a group of `size`, with rings of `ring` bytes.
  static int64_t segment_bytes(int64_t size, int64_t ring);

  // segments: a file descriptor of each rank's segment, the caller's to close. processes: a pidfd of
  // each rank, owned from here on, -1 for its own. spin_ns: how long to look before going to sleep.
  Lane(int64_t rank, int64_t ring, int64_t spin_ns, const std::vector<int64_t>& segments,
       const std::vector<int64_t>& processes);
  ~Lane();
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;

  int64_t rank() const { return rank_; }
  int64_t size() const { return size_; }

  // Begins a collective and returns its number; what the rings have no room for goes out while
  // somebody waits. send_at: where the part for each rank begins; parts to receive lie one after the
  // other. Both buffers must stay until `wait` has returned.
  int64_t start(uint32_t kind, const char* send, const std::vector<int64_t>& send_at,
                const std::vector<int64_t>& send_bytes, char* into,
                const std::vector<int64_t>& recv_bytes);

  // Returns when the collective is complete; throws std::runtime_error after timeout_ns, when a rank
  // that is waited for has left or ended, and when ranks call different collectives.
  void wait(int64_t number, int64_t timeout_ns);

  // Tells the others that this rank takes part no more.
  void leave();

 private:
  struct Part {  // of a message, still to be moved
    int64_t number;
    Header header;
    size_t header_left;
    char* payload;
    size_t left;
  };
  struct Peer {
    Doorbell* bell;
    RingEnds* out;
    RingEnds* in;
    char* out_bytes;
    const char* in_bytes;
    int process;
    std::deque<Part> sends, receives;
  };

  bool advance();
  bool advance_sends(Peer& peer);
  bool advance_receives(int64_t rank, Peer& peer);
  void check(int64_t rank, const Part& expected, const Header& got);
  bool moved(std::deque<Part>& parts, size_t bytes);
  void ring_bell(Peer& peer);
  void sleep(uint32_t seen);
  bool needs(const Peer& peer, int64_t number) const;
  std::string missing(int64_t number) const;
  void refuse_the_gone(int64_t number);

  int64_t rank_, size_, ring_, spin_ns_;
  size_t bytes_;
  int64_t next_ = 0;
  std::vector<char*> mapped_;
  std::vector<Peer> peers_;
  std::map<int64_t, int64_t> parts_left_;  // by collective
};

}  // namespace lockstep
