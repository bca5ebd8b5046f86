package hbone

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/ztun/ztun/tunnel/splice"
)

const (
	// maxSeal is how much plaintext is sealed before the records are written.
	maxSeal = 80 << 10
	// maxResidue is how many sealed bytes may wait for the transport before
	// Write takes no more.
	maxResidue = 64 << 10
	// lingerTimeout bounds how long a closed end waits for its last bytes to
	// be taken by the transport.
	lingerTimeout = 5 * time.Second
)

// errTruncated is what a transport reports that ended without close_notify:
// "an attacker can truncate the data" (RFC 8446 section 6.1), so what rides on
// top sees a reset.
var errTruncated = fmt.Errorf("hbone: connection closed without close_notify: %w", splice.ErrReset)

// buffers holds ciphertext: what was read and not yet opened, or sealed and
// not yet written. An idle connection holds none.
var buffers = sync.Pool{New: func() any { b := make([]byte, 0, maxSeal+4<<10); return &b }}

// A TLS is a TLS connection over a non-blocking end, itself an End. It needs
// no goroutine. Its methods are called on the Loop only.
type TLS struct {
	loop  splice.Loop
	conn  *tls.Conn
	mem   *memory
	ready func()
	wake  splice.Task

	pending    bool // the transport took less than what is sealed
	closeWrite bool // close_notify is sealed, the FIN follows it
	finished   bool // the FIN was sent
	eof        bool // close_notify was received
	err        error
	closed     bool
	released   bool // the transport was closed
	stopLinger func()
}

var _ splice.End = (*TLS)(nil)

// newTLS takes over conn, whose handshake is complete, and its transport mem.
func newTLS(loop splice.Loop, conn *tls.Conn, mem *memory) *TLS {
	t := &TLS{loop: loop, conn: conn, mem: mem}
	t.wake.Run = func() {
		if t.ready != nil {
			t.ready()
		}
	}
	mem.end.Notify(t.onReady)
	t.flush()
	return t
}

// State returns what the handshake found.
func (t *TLS) State() tls.ConnectionState { return t.conn.ConnectionState() }

func (t *TLS) onReady() {
	t.flush()
	if t.ready != nil {
		t.ready()
	}
}

func (t *TLS) Read(p []byte) (int, error) {
	if t.err != nil {
		return 0, t.err
	}
	if t.eof {
		return 0, io.EOF
	}
	n, err := t.conn.Read(p)
	// Read answers key updates and sends alerts.
	if len(t.mem.outBytes()) > 0 {
		t.flush()
	}
	if n > 0 {
		return n, nil
	}
	switch {
	case err == nil || errors.Is(err, splice.ErrAgain):
		return 0, splice.ErrAgain
	case err == io.EOF:
		t.eof = true
		t.mem.releaseIn()
		return 0, io.EOF
	}
	t.fail(fmt.Errorf("hbone: tls: %w", asReset(err)))
	return 0, t.err
}

func (t *TLS) Write(p []byte) (int, error) {
	if t.err != nil {
		return 0, t.err
	}
	if t.closeWrite || t.closed {
		return 0, io.ErrClosedPipe
	}
	total := 0
	for len(p) > 0 {
		if len(t.mem.outBytes()) >= maxResidue {
			return total, splice.ErrAgain
		}
		n, err := t.conn.Write(p[:min(len(p), maxSeal)])
		total += n
		p = p[n:]
		if err != nil {
			t.fail(fmt.Errorf("hbone: tls: %w", asReset(err)))
			return total, t.err
		}
		if t.flush(); t.err != nil {
			return total, t.err
		}
		if t.pending && len(p) > 0 {
			return total, splice.ErrAgain
		}
	}
	return total, nil
}

// flush gives the transport what is sealed, in one Write, and the FIN after
// close_notify.
func (t *TLS) flush() {
	if t.err != nil {
		return
	}
	t.pending = false
	if out := t.mem.outBytes(); len(out) > 0 {
		n, err := t.mem.end.Write(out)
		t.mem.sent(n)
		if err != nil && !errors.Is(err, splice.ErrAgain) {
			t.fail(fmt.Errorf("hbone: write: %w", asReset(err)))
			return
		}
		t.pending = n < len(out)
	}
	if t.closeWrite && !t.finished && !t.pending {
		t.finished = true
		if err := t.mem.end.CloseWrite(); err != nil {
			t.fail(fmt.Errorf("hbone: close: %w", asReset(err)))
			return
		}
	}
	if t.closed && t.finished {
		t.end()
	}
}

// CloseWrite sends close_notify and then the FIN.
func (t *TLS) CloseWrite() error {
	if t.err != nil {
		return t.err
	}
	if t.closeWrite {
		return nil
	}
	t.closeWrite = true
	if err := t.conn.CloseWrite(); err != nil {
		t.fail(fmt.Errorf("hbone: tls: %w", asReset(err)))
		return t.err
	}
	t.flush()
	return t.err
}

// Reset ends the connection without close_notify. What is sealed, such as the
// alert that says why, is offered to the transport first.
func (t *TLS) Reset(cause error) {
	if t.err != nil || t.closed {
		return
	}
	t.flush()
	t.fail(fmt.Errorf("hbone: reset here: %w", cause))
}

// Close gives the connection back. If close_notify is still on its way it
// follows for a while; a direction that is still open is reset.
func (t *TLS) Close() {
	if t.closed {
		return
	}
	t.ready = nil
	if t.err == nil && !(t.closeWrite && t.eof) {
		t.flush()
		t.fail(io.ErrClosedPipe)
	}
	t.closed = true
	if t.err != nil || t.finished {
		t.end()
		return
	}
	t.stopLinger = t.loop.AfterFunc(lingerTimeout, func() { t.fail(io.ErrClosedPipe) })
}

func (t *TLS) Notify(ready func()) {
	t.ready = ready
	t.loop.Soon(&t.wake)
}

// fail ends both directions: the transport is reset.
func (t *TLS) fail(err error) {
	if t.err != nil {
		return
	}
	t.err = err
	t.mem.end.Reset(err)
	t.mem.release()
	if t.ready != nil {
		t.loop.Soon(&t.wake)
	}
	if t.closed {
		t.end()
	}
}

// end lets go of the transport.
func (t *TLS) end() {
	if t.released {
		return
	}
	t.released = true
	if t.stopLinger != nil {
		t.stopLinger()
		t.stopLinger = nil
	}
	if t.err == nil {
		t.err = io.ErrClosedPipe
	}
	t.mem.release()
	t.mem.end.Close()
}

// asReset makes every end of a transport that is no close_notify a reset.
func asReset(err error) error {
	if errors.Is(err, splice.ErrReset) {
		return err
	}
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return errTruncated
	}
	return fmt.Errorf("%w (%w)", err, splice.ErrReset)
}

// memory is the net.Conn under a tls.Conn. While bridge is set a worker uses
// it; after the handshake Read takes from the end and never blocks, and Write
// collects.
type memory struct {
	end     splice.End
	addrs   [2]net.Addr // crypto/tls gives them to callbacks: never nil
	bridge  *handshake
	in, out *[]byte // from buffers, nil while empty
	inAt    int     // where the unread bytes of in begin
	outAt   int     // where the unsent bytes of out begin
}

// preload takes over what the handshake received and did not use, and what it
// has not sent.
func (m *memory) preload(in, out []byte) {
	if len(in) > 0 {
		m.in = buffers.Get().(*[]byte)
		m.inAt = 0
		*m.in = append(*m.in, in...)
	}
	if len(out) > 0 {
		_, _ = m.Write(out) // never fails
	}
}

func (m *memory) Read(p []byte) (int, error) {
	if m.bridge != nil {
		return m.bridge.read(p)
	}
	if m.in == nil {
		m.in = buffers.Get().(*[]byte)
		m.inAt = 0
		room := (*m.in)[:splice.ScratchSize]
		n, err := m.end.Read(room)
		*m.in = room[:n]
		if n == 0 {
			m.releaseIn()
			switch {
			case err == nil:
				return 0, splice.ErrAgain
			case err == io.EOF:
				return 0, errTruncated
			}
			return 0, err
		}
	}
	n := copy(p, (*m.in)[m.inAt:])
	if m.inAt += n; m.inAt == len(*m.in) {
		m.releaseIn()
	}
	return n, nil
}

func (m *memory) Write(p []byte) (int, error) {
	if m.bridge != nil {
		return m.bridge.write(p)
	}
	if m.out == nil {
		m.out = buffers.Get().(*[]byte)
		m.outAt = 0
	}
	*m.out = append(*m.out, p...)
	return len(p), nil
}

// outBytes returns what is sealed and not sent.
func (m *memory) outBytes() []byte {
	if m.out == nil {
		return nil
	}
	return (*m.out)[m.outAt:]
}

// sent forgets the first n of outBytes.
func (m *memory) sent(n int) {
	m.outAt += n
	if m.outAt == len(*m.out) {
		m.releaseOut()
	}
}

func (m *memory) release() { m.releaseIn(); m.releaseOut() }

func (m *memory) releaseIn()  { recycle(&m.in) }
func (m *memory) releaseOut() { recycle(&m.out) }

// recycle gives a buffer back unless it has grown.
func recycle(b **[]byte) {
	if *b == nil {
		return
	}
	if cap(**b) <= 2*maxSeal {
		**b = (**b)[:0]
		buffers.Put(*b)
	}
	*b = nil
}

func (m *memory) Close() error                     { return nil }
func (m *memory) LocalAddr() net.Addr              { return m.addrs[0] }
func (m *memory) RemoteAddr() net.Addr             { return m.addrs[1] }
func (m *memory) SetDeadline(time.Time) error      { return nil }
func (m *memory) SetReadDeadline(time.Time) error  { return nil }
func (m *memory) SetWriteDeadline(time.Time) error { return nil }
