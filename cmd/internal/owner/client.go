package owner

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

var (
	// ErrAway says that the agent is not there, hangs, or cannot say.
	ErrAway = errors.New("owner: the node agent does not say")
	// ErrBusy says that more is asked than is answered. It is no reason to let
	// anything pass: a flood must not get what it did not earn.
	ErrBusy = errors.New("owner: too many questions")
	// ErrRefused says that the question cannot be put.
	ErrRefused = errors.New("owner: not a question about a connection")
)

const (
	// askers is how many questions are asked at once, each on a connection of its own.
	askers = 4
	// maxWaiting bounds those that wait for that.
	maxWaiting = 1024
	// patience is how long the agent may think: well below a second, which is
	// what many probes have.
	patience = 300 * time.Millisecond
	// hungFor is how long nothing is asked of an agent that did not answer.
	hungFor = time.Second
)

// A Client asks the agent.
type Client struct {
	socket   string
	patience time.Duration // Or what tests say.
	waiting  chan asked

	// mu guards the fields below.
	mu      sync.Mutex
	stopped bool
	hung    time.Time // When the agent left a question unanswered.
}

type asked struct {
	message []byte
	done    func(Owner, error)
}

// NewClient makes a client of an agent that listens at socket. Run answers.
func NewClient(socket string) *Client {
	return &Client{socket: socket, patience: patience, waiting: make(chan asked, maxWaiting)}
}

// Ask does not wait. It calls done once, from here or another goroutine, with
// the answer or ErrAway, ErrBusy or ErrRefused.
func (c *Client) Ask(q Question, done func(Owner, error)) {
	message, err := q.append(nil)
	if err != nil {
		done(None, ErrRefused)
		return
	}
	c.mu.Lock()
	err = ErrAway
	if !c.stopped {
		select {
		case c.waiting <- asked{message, done}:
			err = nil
		default:
			err = ErrBusy
		}
	}
	c.mu.Unlock()
	if err != nil {
		done(None, err)
	}
}

// Run asks until ctx ends. What is not answered then, or asked later, is away.
func (c *Client) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	for range askers {
		wg.Go(func() { c.ask(ctx) })
	}
	wg.Wait()
	c.mu.Lock()
	c.stopped = true
	c.mu.Unlock()
	for {
		select {
		case a := <-c.waiting:
			a.done(None, ErrAway)
		default:
			return context.Cause(ctx)
		}
	}
}

// ask puts one question after the other.
func (c *Client) ask(ctx context.Context) {
	var conn net.Conn
	defer func() {
		if conn != nil {
			_ = conn.Close()
		}
	}()
	for {
		select {
		case a := <-c.waiting:
			a.done(c.put(ctx, &conn, a.message))
		case <-ctx.Done():
			return
		}
	}
}

// put asks on a connection, which is made where there is none or the agent has
// started again since the last question.
func (c *Client) put(ctx context.Context, conn *net.Conn, message []byte) (Owner, error) {
	if c.isHung() {
		return None, ErrAway
	}
	for try := 1; ; try++ {
		old := *conn != nil
		if !old {
			d := net.Dialer{Timeout: c.patience}
			fresh, err := d.DialContext(ctx, "unixpacket", c.socket)
			if err != nil {
				return None, fmt.Errorf("%w: %w", ErrAway, err)
			}
			*conn = fresh
		}
		o, err := c.exchange(*conn, message)
		if err == nil || err == ErrAway {
			return o, err
		}
		_ = (*conn).Close()
		*conn = nil
		var timeout net.Error
		if errors.As(err, &timeout) && timeout.Timeout() {
			c.noteHung()
			return None, fmt.Errorf("%w: %w", ErrAway, err)
		}
		if !old || try > 1 {
			return None, fmt.Errorf("%w: %w", ErrAway, err)
		}
	}
}

// exchange sends a question and waits for its answer.
func (c *Client) exchange(conn net.Conn, message []byte) (Owner, error) {
	if err := conn.SetDeadline(time.Now().Add(c.patience)); err != nil {
		return None, err
	}
	if _, err := conn.Write(message); err != nil {
		return None, err
	}
	var buf [answerLen + 1]byte
	n, err := conn.Read(buf[:])
	if err != nil {
		return None, err
	}
	return parseAnswer(buf[:n])
}

func (c *Client) isHung() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return !c.hung.IsZero() && time.Since(c.hung) < hungFor
}

func (c *Client) noteHung() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.hung = time.Now()
}
