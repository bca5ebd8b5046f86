package meshtest

import (
	"errors"
	"net"
	"os"
	"testing"
	"time"
)

// maxStalled is what a sender may get rid of before it is stopped, in bytes:
// the buffers of both kernels and of all proxies between. Both kernels alone
// take 1 MiB; the sender's takes more the more was acknowledged.
const maxStalled = 3 << 20

func TestSenderToAStalledReaderIsStopped(t *testing.T) {
	eachLayout(t, func(t *testing.T, w *two) {
		outside := w.Bare("outside", nil)
		stalled := make(chan net.Conn, 3)
		for _, p := range []*Pod{w.server, outside} {
			defer p.serve(t, ":8080", func(c net.Conn) { stalled <- c }).Close()
		}
		for _, c := range []struct {
			path   string
			client *Pod
			server *Pod
		}{
			{"tunnel", w.client, w.server},
			{"plaintext out", w.client, outside},
			{"plaintext in", outside, w.server},
		} {
			if n := c.client.push(t, addr(c.server.Addr, 8080)); n > maxStalled {
				t.Errorf("%s: %d KiB were sent to a reader that reads nothing, want at most %d", c.path, n>>10, maxStalled>>10)
			} else {
				t.Logf("%s: %d KiB", c.path, n>>10)
			}
			(<-stalled).Close()
		}
	})
}

// push sends until nothing goes any more, and returns how much went.
func (p *Pod) push(t *testing.T, to string) int {
	t.Helper()
	c, err := p.NS.Dial("tcp", to, patience)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	sent := 0
	for piece := make([]byte, 64<<10); sent <= 2*maxStalled; {
		c.SetWriteDeadline(time.Now().Add(time.Second))
		n, err := c.Write(piece)
		sent += n
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return sent
}
