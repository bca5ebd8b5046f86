package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"time"
)

// The ports of a server pod.
const (
	portHTTP   = 8080
	portStream = 8081
	portIdle   = 8082
	portStall  = 8083
)

// An order is what an agent is told to do: a line of JSON on its standard
// input.
type order struct {
	Do    string         `json:"do"`
	Addr  netip.AddrPort `json:"addr,omitzero"`  // The server's.
	Conns int            `json:"conns,omitzero"` // How many connections.
	Down  bool           `json:"down,omitzero"`  // streams: from the server.
	Fresh bool           `json:"fresh,omitzero"` // requests: each on a connection of its own.
	Rate  int            `json:"rate,omitzero"`  // requests: a second. 0: as fast as it goes.
	Warm  time.Duration  `json:"warm,omitzero"`  // requests: before they count.
	For   time.Duration  `json:"for,omitzero"`   // requests: while they count.
	// InFlight is how many requests may be on their way at once, in turn on
	// all connections, and how many connections may be coming up. 0: all.
	InFlight int `json:"inFlight,omitzero"`
	// From are the network namespaces that connections for requests are made
	// in, by path, in turn. Empty: the worker's own.
	From     []string `json:"from,omitzero"`
	OneByOne bool     `json:"oneByOne,omitzero"` // idle: the next when one is open.
	PIDs     []int    `json:"pids,omitzero"`     // usage: of whom.
	File     string   `json:"file,omitzero"`     // write: where.
	Text     string   `json:"text,omitzero"`     // write: what. Empty: the file goes.
	// Machine asks usage for Memory too.
	Machine bool `json:"machine,omitzero"`
}

// An answer is what an agent says when it has done an order.
type answer struct {
	Error string `json:"error,omitempty"`
	PID   int    `json:"pid,omitzero"`
	// Of count: bytes received on streams so far, and the agent's clock.
	Bytes uint64        `json:"bytes,omitzero"`
	Clock time.Duration `json:"clock,omitzero"`
	// Of requests.
	Load *load `json:"load,omitempty"`
	// Of usage: one for each PID. Memory, in bytes, is the kernel's on the
	// whole machine and that of all processes of the lab, but no file cache.
	Usage  []usage `json:"usage,omitempty"`
	Memory uint64  `json:"memory,omitzero"`
	// Of idle: how many connections are open, why not more, and how long it
	// took. Of the sweeps: on how many the byte went.
	Open    int           `json:"open,omitzero"`
	Failure string        `json:"failure,omitempty"`
	Took    time.Duration `json:"took,omitzero"`
	// Of known: how many services, and workloads, the proxy knows of those
	// that the bench made up; the lesser number.
	Known int `json:"known,omitzero"`
}

// A load is the outcome of requests.
type load struct {
	Total   uint64        `json:"total"`  // All answered, also before they counted.
	Done    uint64        `json:"done"`   // Answered while they counted.
	Failed  uint64        `json:"failed"` // Not answered. Only fresh ones may fail.
	Failure string        `json:"failure,omitempty"`
	Window  time.Duration `json:"window"` // How long they counted.
	// Latency is from when a request was due, not from when it was sent: a
	// stall counts for all who would have come meanwhile.
	Latency histogram `json:"latency"`
}

// rate is how many requests were answered a second.
func (l *load) rate() float64 { return float64(l.Done) / l.Window.Seconds() }

func (l *load) merge(other *load) {
	l.Total += other.Total
	l.Done += other.Done
	l.Failed += other.Failed
	if l.Failure == "" {
		l.Failure = other.Failure
	}
	l.Window = max(l.Window, other.Window)
	l.Latency.merge(&other.Latency)
}

// A worker is an agent: the bench's own program in a pod, or elsewhere in the
// lab. It does one order after the other until its standard input ends.
type worker struct {
	began   time.Time
	streams *streams
	idle    idlers
}

func runWorker(in io.Reader, out io.Writer) error {
	w := &worker{began: time.Now(), streams: &streams{}}
	lines := bufio.NewReader(in)
	for {
		line, err := lines.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("bench: orders: %w", err)
		}
		var o order
		var a answer
		if err = json.Unmarshal(line, &o); err == nil {
			a, err = w.do(o)
		}
		if err != nil {
			a = answer{Error: err.Error()}
		}
		if err := json.NewEncoder(out).Encode(a); err != nil {
			return fmt.Errorf("bench: answer: %w", err)
		}
	}
}

func (w *worker) do(o order) (answer, error) {
	switch o.Do {
	case "hello":
		return answer{PID: os.Getpid()}, nil
	case "serve":
		return answer{}, w.serve()
	case "requests":
		l, err := runRequests(o)
		return answer{Load: l}, err
	case "streams":
		return answer{}, w.streams.open(o)
	case "count":
		return answer{Bytes: w.streams.received.Load(), Clock: time.Since(w.began)}, nil
	case "end-streams":
		w.streams.close()
		return answer{}, nil
	case "serve-idle":
		return answer{}, w.idle.serve()
	case "idle":
		return w.idle.open(o)
	case "poke", "echo", "hear":
		return answer{Open: w.idle.sweep(o.Do)}, nil
	case "stall":
		n, err := stall(netip.AddrPortFrom(o.Addr.Addr(), portStall))
		return answer{Bytes: n}, err
	case "known":
		n, err := countKnown()
		return answer{Known: n}, err
	case "redirect":
		return answer{}, redirect(o.Addr.Addr())
	case "usage":
		return measureUsage(o)
	case "write":
		return answer{}, write(o.File, o.Text)
	}
	return answer{}, fmt.Errorf("bench: unknown order %q", o.Do)
}

// write puts text into a file, whole, or takes the file away.
func write(file, text string) error {
	if text == "" {
		if err := os.Remove(file); err != nil {
			return fmt.Errorf("bench: %w", err)
		}
		return nil
	}
	return writeWhole(file, []byte(text))
}

// writeWhole writes a file that readers never see in part.
func writeWhole(path string, content []byte) error {
	temporary := path + ".new"
	if err := os.WriteFile(temporary, content, 0o644); err != nil {
		return fmt.Errorf("bench: %w", err)
	}
	if err := os.Rename(temporary, path); err != nil {
		return fmt.Errorf("bench: %w", err)
	}
	return nil
}
