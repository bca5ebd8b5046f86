package netstack

import (
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ztun/ztun/tunnel/splice"
)

// twoReaders are readers without pods, and the threads that they run on.
func twoReaders(t *testing.T) (a, b *reader, onA, onB int) {
	t.Helper()
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(max(4, runtime.GOMAXPROCS(0))))
	e, err := New(Config{Readers: 2})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(e.Close)
	a, b = e.readers[0], e.readers[1]
	return a, b, thread(a), thread(b)
}

// thread asks r for its thread, which nobody else can do for it.
func thread(r *reader) int {
	tid := make(chan int, 1)
	r.Post(func() { tid <- unix.Gettid() })
	return <-tid
}

// untilAsleep waits until r's thread sleeps and nobody runs its loop.
func untilAsleep(t *testing.T, r *reader) {
	t.Helper()
	for end := time.Now().Add(patience); ; time.Sleep(100 * time.Microsecond) {
		if r.sleeping.Load() && r.turns.TryLock() {
			r.turns.Unlock()
			return
		}
		if time.Now().After(end) {
			t.Fatal("the reader does not sleep")
		}
	}
}

// A little work for a reader that sleeps is done on the thread that has it, what
// it gives back too; much is done on its own.
func TestAReaderHelpsAnother(t *testing.T) {
	a, b, onA, onB := twoReaders(t)
	// on is where n functions handed from a to b ran.
	on := func(n int) (tid int) {
		untilAsleep(t, b)
		ran, back := make(chan int, n), make(chan int, n)
		a.Post(func() {
			for range n {
				a.Hand(b, func() {
					ran <- unix.Gettid()
					b.Hand(a, func() { back <- unix.Gettid() })
				})
			}
		})
		for range n {
			tid = <-ran
			<-back
		}
		return tid
	}
	// A signal may wake b for a moment, and b may find no CPU: not each time is
	// as it should be.
	for n, want := range map[int]int{1: onA, helpMost: onA, helpMost + 1: onB, 1000: onB} {
		for end := time.Now().Add(patience); on(n) != want; {
			if time.Now().After(end) {
				t.Fatalf("%d functions never ran on thread %d (a's is %d, b's %d)", n, want, onA, onB)
			}
		}
	}
	// To itself, and to a loop of another kind.
	done := make(chan int, 1)
	a.Post(func() { a.Hand(a, func() { done <- unix.Gettid() }) })
	if got := <-done; got != onA {
		t.Errorf("its own ran on thread %d, want %d", got, onA)
	}
}

// A reader that was woken and does not come finds its work done, and is not
// woken again for a while.
func TestAReaderTakesWorkBack(t *testing.T) {
	a, b, onA, _ := twoReaders(t)
	// A signal may wake b for a moment: then it does its work itself.
	for end := time.Now().Add(patience); !takesBack(t, a, b, onA); {
		if time.Now().After(end) {
			t.Fatal("b always did its work itself")
		}
	}
}

// takesBack hands b more than helpMost functions in each of many passes. b's
// thread sleeps but in the first pass seems to have been woken. It reports
// whether a did all of the next passes, and woke nobody.
func takesBack(t *testing.T, a, b *reader, onA int) bool {
	untilAsleep(t, b)
	const most = 2 * aloneFor
	ran := make(chan [2]int, most*(helpMost+1))
	pass, woken := 0, false
	var next func()
	next = func() {
		if pass++; pass > most {
			return
		}
		switch {
		case pass == 1:
			a.alone = 0
			b.sleeping.Store(false)
		case pass == 2:
			b.sleeping.Store(true)
		case pass < aloneFor:
			woken = woken || !b.sleeping.Load()
		}
		now := pass
		for range helpMost + 1 {
			a.Hand(b, func() { ran <- [2]int{now, unix.Gettid()} })
		}
		a.AfterFunc(0, next) // in the next pass
	}
	a.Post(next)
	taken := true
	for range cap(ran) {
		if got := <-ran; got[0] < aloneFor && got[1] != onA {
			taken = false
		}
	}
	return taken && !woken
}

// A deadline that was set while another thread ran the loop is kept, though
// the reader's own sleeps without one.
func TestAHelpedReaderKeepsDeadlines(t *testing.T) {
	a, b, onA, onB := twoReaders(t)
	for end := time.Now().Add(patience); ; {
		untilAsleep(t, b)
		set, rang := make(chan int, 1), make(chan int, 1)
		a.Post(func() {
			a.Hand(b, func() {
				set <- unix.Gettid()
				b.AfterFunc(10*time.Millisecond, func() { rang <- unix.Gettid() })
			})
		})
		helped := <-set == onA
		select {
		case got := <-rang:
			if got != onB {
				t.Errorf("the timer ran on thread %d, want %d", got, onB)
			}
		case <-time.After(patience):
			t.Fatal("the timer did not go off")
		}
		if helped {
			return
		}
		if time.Now().After(end) {
			t.Fatal("b was never helped")
		}
	}
}

// What helped work leaves behind is not forgotten: posts, tasks and hands to a
// third.
func TestAHelpedReaderFinishesItsWork(t *testing.T) {
	a, b, _, _ := twoReaders(t)
	const chain = 100
	done := make(chan struct{})
	var task splice.Task
	left := chain
	task.Run = func() {
		if left--; left == 0 {
			close(done)
			return
		}
		switch left % 3 {
		case 0:
			b.Soon(&task)
		case 1:
			b.Post(task.Run)
		case 2:
			b.Last(&task)
		}
	}
	untilAsleep(t, b)
	a.Post(func() { a.Hand(b, task.Run) })
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatalf("%d of %d steps are left", left, chain)
	}
}

// Much to do of its own: the other is woken, however little it is.
func TestABusyReaderWakesTheOther(t *testing.T) {
	a, b, _, onB := twoReaders(t)
	for name, busy := range map[string]func(){
		"a device has more": func() { a.more = true },
		"a function waits":  func() { a.Post(func() {}) },
	} {
		untilAsleep(t, b)
		ran, woken := make(chan int, 1), make(chan bool, 1)
		// At the end of the pass, after its last round.
		last := splice.Task{Run: func() {
			a.alone = 0
			a.Hand(b, func() { ran <- unix.Gettid() })
			a.AfterFunc(0, func() { woken <- !b.sleeping.Load() }) // in the next pass
			busy()
		}}
		a.Post(func() { a.Last(&last) })
		// If b does not come soon a takes the work back.
		if w := <-woken; <-ran != onB && !w {
			t.Errorf("%s: b was not woken", name)
		}
	}
}

// Somebody runs the other's loop and may be done with it: it is woken.
func TestHandToALoopThatIsRun(t *testing.T) {
	a, b, _, _ := twoReaders(t)
	untilAsleep(t, b)
	b.turns.Lock()
	handed, ran := make(chan struct{}), make(chan struct{})
	a.Post(func() { a.Hand(b, func() { close(ran) }) })
	a.Post(func() { a.AfterFunc(0, func() { close(handed) }) }) // in the next pass
	<-handed
	b.turns.Unlock()
	select {
	case <-ran:
	case <-time.After(patience):
		t.Fatal("what was handed is lost")
	}
}

// Helped work may hand on, and may start goroutines: they are in the queue of the
// thread that helped.
func TestAHelpedReaderHandsOn(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(max(5, runtime.GOMAXPROCS(0))))
	e, err := New(Config{Readers: 3})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	a, b, c := e.readers[0], e.readers[1], e.readers[2]
	onA := thread(a)
	for end := time.Now().Add(patience); ; {
		untilAsleep(t, b)
		untilAsleep(t, c)
		helped, started, ran := false, make(chan bool, 1), make(chan struct{})
		a.Post(func() {
			a.Hand(b, func() {
				helped = unix.Gettid() == onA
				b.started = true
				b.Hand(c, func() { close(ran) })
			})
			a.AfterFunc(0, func() { a.Hand(b, func() { started <- b.started }) })
		})
		select {
		case <-ran:
		case <-time.After(patience):
			t.Fatal("what was handed on is lost")
		}
		if still := <-started; helped {
			if still {
				t.Error("b is to yield for what runs elsewhere")
			}
			return
		}
		if time.Now().After(end) {
			t.Fatal("b was never helped")
		}
	}
}

// Everything that is handed or posted runs once, in order, and never two things
// of one loop at a time.
func TestHandsBetweenBusyReaders(t *testing.T) {
	a, b, _, _ := twoReaders(t)
	const each = 20_000
	var busy [2]atomic.Bool
	var wg sync.WaitGroup
	for i, from := range []*reader{a, b} {
		to := []*reader{b, a}[i]
		next, sent := 0, 0
		wg.Add(each)
		work := func(n int) func() {
			return func() {
				if busy[1-i].Swap(true) {
					t.Error("two threads run one loop")
				}
				if n != next {
					t.Errorf("%d came for %d", n, next)
				}
				next++
				busy[1-i].Store(false)
				wg.Done()
			}
		}
		var task splice.Task
		task.Run = func() {
			for range 1 + sent%7 {
				if sent == each {
					return
				}
				if sent%5 == 0 {
					to.Post(work(sent))
				} else {
					from.Hand(to, work(sent))
				}
				sent++
			}
			from.Post(func() { from.Soon(&task) })
		}
		from.Post(task.Run)
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatal("some were lost")
	}
}

// An engine can be closed at any time.
func TestCloseWhileReadersHelp(t *testing.T) {
	for range 50 {
		defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(max(4, runtime.GOMAXPROCS(0))))
		e, err := New(Config{Readers: 2})
		if err != nil {
			t.Fatal(err)
		}
		a, b := e.readers[0], e.readers[1]
		var there, back func()
		there = func() { a.Hand(b, back) }
		back = func() { b.Hand(a, there) }
		for range 3 {
			a.Post(there)
		}
		runtime.Gosched()
		e.Close()
	}
}
