r"""Pairs of a gold answer and one in a box, by kind: RIGHT pays, WRONG does not."""

RIGHT: dict[str, list[tuple[str, str]]] = {
    "numbers": [
        ("5", "5.00"), ("033", "33"), ("27.0", "27"), ("-7", "−7"), ("-7", r"-\,7"), ("5", "+5"), ("12", "12."),
        ("0.5", ".5"), ("0.5", r"\frac12"), (r"\frac{3}{4}", "0.75"), (r"\frac{3}{4}", "3/4"), (r"-\frac{1}{2}", r"\frac{-1}{2}"),
        (r"-\frac{1}{2}", r"\frac{1}{-2}"), (r"\frac{6}{8}", r"\tfrac34"), ("10/4", "2.5"), (r"\frac{7}{3}", r"2\frac{1}{3}"),
        (r"1\frac{1}{2}", "1.5"), (r"-1\frac12", "-1.5"), ("1 1/2", r"\frac32"), ("1½", "1.5"), ("0", "-0"),
        (r"0.1\overline{6}", r"\frac16"), (r"0.\overline{142857}", "1/7"), ("1e-5", "0.00001"), (r"3 \times 10^8", "300000000"),
        ("6.02e23", r"6.02 \times 10^{23}"), (r"2^{10}", "1024"), ("120", "5!"), ("10", r"\binom{5}{2}"), ("４２", "42"),
        ("3", r"\lfloor 3.7 \rfloor"), ("3", r"\log_2 8"), (r"\infty", "∞"), (r"-\infty", "-∞"), (r"+\infty", r"\infty"),
    ],
    "thousands": [
        ("1000000", "1,000,000"), ("1,234.5", "1234.5"), ("1234567", r"1{,}234{,}567"), ("-12345", "-12,345"),
        ("12000", "12 000"), ("12000", r"12\;000"), (r"\$1,250", "1250"), ("(1000, 2000)", "(1,000, 2,000)"), ("0.5", "0{,}5"),
    ],
    "what surrounds": [
        ("7", "**7**"), ("7", "`7`"), ("7", "$7$"), ("7", r"\(7\)"), ("7", r"\boxed{7}"), ("7", "The answer is 7."),
        ("7", "Answer: 7"), ("7", r"\text{7}"), ("7", r"\mathbf{7}"), ("7", "= 7"), ("7", r"\displaystyle 7"), ("7", "{7}"),
        ("7", "(7)"), (r"\frac12", r"\left(\dfrac{1}{2}\right)"), ("The answer is 7.", "7"), ("7", "n = 7"), ("7", r"n = 3 + 4 = 7"),
        (r"2\sqrt{2}", r"2\sqrt2 \approx 2.83"), ("7", r"\textbf{(C)}\ 7"), ("7", r"\text{Area} = 7"), ("7", r"a + b = 7"),
    ],
    "irrational": [
        (r"\sqrt{8}", r"2\sqrt{2}"), (r"\frac{1}{\sqrt{3}}", r"\frac{\sqrt{3}}{3}"), (r"\sqrt{2}", "1.41421356"),
        (r"\sqrt{2}", "1.414213"), ("2π", r"2\pi"), (r"\pi/2", r"\frac{\pi}{2}"), (r"\pi", "3.14159265"), ("3.14159", r"\pi"),
        ("0.333", r"\frac13"), (r"\ln 8", r"3 \ln 2"), (r"\log 4", r"2\log 2"), (r"\frac{\ln 3}{\ln 2}", r"\log_2 3"), ("e^2", r"\mathrm{e}^{2}"),
        (r"\sqrt{5+2\sqrt{6}}", r"\sqrt{2}+\sqrt{3}"), (r"\cos 60^\circ", r"\frac12"), (r"\sqrt2", "2^{1/2}"), (r"\sqrt[3]{2}", "2^{1/3}"),
        (r"9^{9^{9^{9}}}", r"9^{9^{9^9}}"), ("sqrt(3)", r"\sqrt{3}"), ("2 sqrt(3)", r"\sqrt{12}"), ("√12", r"2√3"),
    ],
    "complex": [("3+4i", "4i + 3"), ("i", r"\sqrt{-1}"), ("e^{i\\pi}", "-1"), (r"\frac{1+i}{\sqrt2}", "e^{i\\pi/4}"), ("(1+i)^2", "2i")],
    "formulas": [
        ("x^2+2x+1", "(x+1)^2"), ("2x+3", "3+2x"), (r"\frac{1}{2n+2}", r"\dfrac{1}{2(n+1)}"), ("x²", "x^2"), ("3xy", "3yx"),
        (r"\frac{n(n+1)}{2}", r"\binom{n+1}{2}"), ("n!", "n(n-1)!"), (r"\sin 2x", r"2\sin x\cos x"), (r"\tan x", r"\frac{\sin x}{\cos x}"),
        ("|x|", r"\sqrt{x^2}"), ("e^{x+1}", r"e \cdot e^x"), ("2^{n+1}", r"2\cdot2^n"), ("x_1 + x_2", "x_{2} + x_{1}"), ("f(2)+1", "1+f(2)"),
        (r"2a\cdot b", "2ab"), (r"\frac{a}{b}", "a/b"), ("x^{-1}", r"\frac1x"), (r"\theta", "θ"), ("A", "(A)"), ("A", r"\text{(A)}"),
        (r"\text{(B)}", "B"), ("B", "B."),
    ],
    "units": [
        ("12", r"12 \text{ cm}"), ("12", "12 cm"), (r"12 \text{ cm}", "12"), (r"12\text{ cm}", r"12\ \mathrm{cm}"),
        (r"12 \text{ cm}", "12 centimeters"), (r"12 \text{ cm}^2", r"12\ \text{square centimeters}"), (r"12\text{ cm}^{2}", r"12\,cm^2"),
        ("5", r"5 \text{ apples}"), ("1 hour", r"1 \text{ hours}"), (r"\$12", "12"), ("12", r"\$12.00"), (r"12 \text{ dollars}", r"\$12"),
        ("€5", "5"), ("90", r"90^\circ"), (r"90^{\circ}", "90"), ("90°", r"90 \text{ degrees}"), (r"50\%", "50"), (r"50\%", "0.5"),
        ("50", r"50\%"), ("0.5", r"50\%"), (r"\frac14", r"25\%"), (r"12.5\%", r"\frac18"), (r"50\%", "50 percent"), ("3000000", r"3 \text{ million}"),
        (r"\$3 \text{ million}", "3,000,000"), ("5", r"5^{\text{th}}"), ("60", r"60 \text{ miles per hour}"), ("60 km/h", r"60\text{ km/h}"),
        (r"3 \pmod{7}", r"x \equiv 3 \pmod 7"), ("3", r"3 \bmod 7"), (r"\frac{9}{2}\text{ m}", "4.5 meters"), (r"25\pi", r"25\pi \text{ square units}"),
    ],
    "lists and sets": [
        ("1, 2", "2, 1"), ("1,2", r"1 \text{ and } 2"), ("1, 2", r"\{1, 2\}"), (r"\{1,2,3\}", r"\{3, 2, 1\}"), ("x=1, x=2", r"x = 1 \text{ or } x = 2"),
        ("1, 2", "x=1 or x=2"), ("-2, 2", r"\pm 2"), ("-2, 2", r"x = \pm 2"), (r"1 \pm \sqrt{2}", r"1+\sqrt2, 1-\sqrt2"), ("x=1, x=2", "x = 1, 2"),
        (r"x_1 = 1, x_2 = 2", "1, 2"), (r"\{1, 1, 2\}", r"\{1,2\}"), (r"\{1,2\}", r"x \in \{2, 1\}"), ("1; 2", "1, 2"), (r"\{-1,1\}", r"\pm1"),
        ("x=1, y=2", "y = 2, x = 1"), ("(1,2), (3,4)", r"(3,4) \text{ and } (1,2)"), (r"\emptyset", r"\{\}"), (r"\emptyset", "∅"), ("100, 200", "100,200"),
        ("3, 5, 7", r"3, 5, \text{ and } 7"), ("3 apples and 2 pears", r"3 \text{ apples and } 2 \text{ pears}"),
    ],
    "tuples and intervals": [
        ("(1, 2)", "(1,2)"), ("(1, 2)", r"\left( 1 , \frac42 \right)"), ("(3, \\frac{\\pi}{2})", r"(3, \pi/2)"), ("(1,2)", "(x, y) = (1, 2)"),
        ("[0, 1)", r"\left[0,1\right)"), (r"(-\infty, 3]", r"x \le 3"), ("(3, \\infty)", "x > 3"), ("x > 3", "(3,\\infty)"), ("x>3", "3 < x"),
        ("[1, 2)", r"1 \leq x < 2"), ("[-2,7]", r"x \in [-2,7]"), (r"(-\infty,1)\cup(2,\infty)", r"(2,\infty) \cup (-\infty, 1)"),
        (r"(-\infty,1)\cup(2,\infty)", r"x<1 \text{ or } x>2"), (r"\mathbb{R}", r"(-\infty, \infty)"), ("all real numbers", r"\mathbb{R}"), (r"\langle 1, 2 \rangle", r"\left<1,2\right>"),
        ("(100,200)", "(100, 200)"),
    ],
    "relations": [
        ("x = 5", "5"), ("5", "x=5"), ("x=5", "5 = x"), ("y = 2x+3", "2x + 3"), ("y = 2x + 3", "2x - y + 3 = 0"), ("x^2+y^2=1", "1 = y^2+x^2"),
        ("2x+3y=6", "4x + 6y = 12"), ("f(x) = x^2", "x^2"), ("x^2", "f(x)=x^2"), ("x > 3", "2x > 6"), ("x+y<1", "1 > y + x"), (r"a \le b", r"b \ge a"),
        ("-x < -3", "x > 3"), (r"x \ne 3", r"x \neq 3"), (r"\angle ABC = 30^\circ", "30"),
    ],
    "numerals, times, ratios": [
        ("52_8", "52_{8}"), ("1010_2", r"1010_{\text{two}}"), ("A3F_{16}", r"\mathrm{A3F}_{16}"), ("2:30", "2:30"), (r"2:30 \text{ p.m.}", "2:30 PM"),
        ("2:30", "2:30 pm"), ("3:4", "3 : 4"), ("3:4", "6:8"), (r"\frac34", "3:4"), ("2:3:5", "2 : 3 : 5"), ("2024-01-05", "2024-01-05"),
    ],
    "matrices and cases": [
        (r"f(x) = \begin{cases} 1 & \text{if } x>0 \\ 0 & \text{otherwise} \end{cases}", r"\begin{cases} 1 & x>0 \\ 0 & \text{otherwise} \end{cases}"),
        (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{bmatrix}1&2\\3&\frac82\end{bmatrix}"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\\\end{pmatrix}"),
        (r"\begin{cases} 1 & \text{if } x>0 \\ 0 & \text{otherwise} \end{cases}", r"\begin{cases} 1, & x > 0 \\ 0, & \text{else} \end{cases}"),
    ],
    "texts": [
        (r"\text{Evelyn}", "Evelyn"), ("Yes", r"\text{yes}"), ("No", "No."), ("n is odd", r"n \text{ is odd}"), (r"\text{no solution}", "No solution"),
        ("undefined", r"\text{Undefined}"), ("H_2O", r"\mathrm{H_2O}"), ("H2O", r"\text{H}_2\text{O}"), ("ABC", r"\text{ABC}"), (r"\text{Even}", "**even**"),
        ("Alice, Bob", "Alice and Bob"), ("parallelogram", r"\textbf{parallelogram}"), ("True", "true"), (r"\text{odd}", r"\textit{odd}"),
    ],
    "sums and integrals": [
        (r"\sum_{k=1}^{n} \frac{1}{k}", r"\sum_{j=1}^{n} \frac{1}{j}"), (r"\int_0^1 x^2 dx", r"\int_{0}^{1} x^2 \, dx"),
        (r"\sum_{k=1}^n a_k", r"\sum_{k=1}^{n}a_k"),
    ],
}  # fmt: skip

WRONG: dict[str, list[tuple[str, str]]] = {
    "numbers": [
        ("5", "6"), ("5", "-5"), ("5", "55"), ("5", "5.01"), ("0.5", "0.05"), (r"\frac13", "0.33"), (r"\frac13", "0.3333333"), ("5", "0.5e2"), ("12", "1 2"),
        (r"1\frac12", r"\frac12"), (r"-1\frac12", "-0.5"), ("10^{-20}", "10^{-30}"), ("10^{-20}", "0"), (r"\frac{1}{3^{80}}", r"\frac{1}{3^{81}}"),
        ("10^{20}", "10^{20}+1"), ("123456789123456789", "123456789123456788"), (r"0.\overline{3}", "0.3"), ("0.3", r"\frac13"), ("0.5", r"\frac{12}{25}"),
        (r"\infty", r"-\infty"), (r"\infty", "10^{100}"), ("2024!", "2025!"), ("5-7", "-2"), (r"\frac{2}{3}", r"\frac{3}{2}"), ("3.14", "3.1401"),
        ("2", r"\frac{2}"), ("1", r"\frac{1}{0}"), ("5", "5 6"), ("25", "5^2^1"), ("0", "0.0000001"), ("1e-7", "2e-7"), ("11", "1!1"), ("6", "3!!"),
    ],
    "thousands": [("1000", "1,00"), ("1000", "1,000,00"), ("0", "1,000"), ("1", "1,000"), ("(100,200)", "100200"), ("1, 0", "1,000"), ("1234", "12,34")],
    "what surrounds": [
        ("5", "5 or 6"), ("5", "5, 6"), ("5", "not 5"), ("5", r"x \neq 5"), ("5", "x > 5"), ("5", "4 + 2 = 5"), ("6", "5 = 6"), ("5", r"\approx 4.9"), ("5", "5?"),
        ("5", "5x"), ("5", "5^2"), ("5", r"\sqrt{5"), ("5", r"5 \text{ or more}"), ("5", r"\text{at least } 5"), ("5", r"\text{not } 5"), ("5", "the answer is 5 or 6"),
    ],
    "irrational": [
        (r"\sqrt{2}", "1.41"), (r"\sqrt{2}", "1.41422"), (r"\pi", "3.14"), (r"\pi", r"\frac{22}{7}"), (r"\pi", "3.14160"), (r"\sqrt{2}", r"-\sqrt{2}"), (r"\ln 2", r"\log 2"),
        (r"\ln 2", r"\log_2 2"), (r"\frac{\pi}{2}", "90"), (r"2\sqrt3", r"3\sqrt2"), (r"\sqrt{2}+10^{-15}", r"\sqrt2"), (r"e", r"\pi"), (r"\sqrt[3]{2}", r"\sqrt{2}"),
    ],
    "complex": [("3+4i", "3-4i"), ("i", "-i"), ("i", "1"), ("2+i", "2i")],
    "formulas": [
        ("x^2+2x+1", "(x+2)^2"), ("x", "X"), ("x", "y"), ("f'(x)", "f(x)"), ("f''(x)", "f'(x)"), ("x_1", "x_2"), ("2x", "x^2"), (r"\sqrt{x^2}", "x"), ("2^n", "n^2"),
        ("x^2 + 10^{-9}", "x^2"), ("AB", "BA"), ("n!", "n^n"), (r"\sin x", r"\cos x"), (r"\sin^2 x", r"\sin x^2"), (r"\frac{1}{2x}", "x/2"), ("f(2)", "2f"), ("n", r"n \text{ is odd}"),
        ("A", "B"), ("a", "A"), ("A", "A or B"), (r"\text{(A)}", "(B)"), ("x+1", "x+1=0"), ("CO", "OC"), ("x'", "x"),
    ],
    "units": [
        (r"12 \text{ cm}", r"12 \text{ m}"), ("12 cm", "12 m"), (r"12 \text{ cm}", r"12 \text{ cm}^2"), (r"12\text{ cm}^2", r"12 \text{ cm}^3"), (r"\$12", "€12"), (r"\$12", r"12 \text{ cents}"),
        ("12", r"12 \text{ million}"), (r"3 \text{ million}", "3"), (r"3 \text{ million}", r"3 \text{ billion}"), ("5 apples", "5 pears"), ("5", r"5 \text{ dozen}"),
        (r"\frac12", r"\frac12 \%"), (r"0.5", r"0.5\%"), (r"50\%", "5"), (r"50\%", "0.05"), (r"2 \text{ hours } 30 \text{ minutes}", r"2 \text{ hours } 45 \text{ minutes}"), ("20 miles", "20 kilometers"),
        (r"30^\circ C", r"30^\circ F"), (r"3 \pmod 7", r"3 \pmod 5"), (r"3 \pmod 7", "4"), ("12", "12x"), ("5", r"5 \text{ times } 3"), (r"2 \text{ hours } 30 \text{ minutes}", "30"),
        (r"60 \text{ km/h}", r"60 \text{ m/s}"), (r"5 \text{ mW}", r"5 \text{ MW}"),
    ],
    "lists and sets": [
        ("1, 2", "1"), ("1, 2", "1, 2, 3"), ("1, 2", "1, 1"), ("1, 2", "(1, 2)"), ("1, 2, 3", "(1,2,3)"), (r"\{1,2\}", r"\{1,3\}"), ("-2, 2", "2"), (r"\pm 2", "-2"), ("x=1, y=2", "x=2, y=1"),
        ("1, 1, 2", "1, 2"), (r"\emptyset", "0"), (r"\emptyset", r"\{0\}"), (r"\{1, 2\}", r"(1, 2)"), ("Alice, Bob", "Bob, Alice"), ("2", r"\pm 2"), (r"\{\{1\},2\}", r"\{1,\{2\}\}"), ("x=1, x=2", "x=1, x=3"),
        ("x=1, y=2", "2, 1"),
    ],
    "tuples and intervals": [
        ("(1, 2)", "(2, 1)"), ("(1,2)", "[1,2]"), ("[1,2)", "(1,2]"), ("(1,2)", "1, 2"), ("(1,2)", r"\{1,2\}"), ("(1,2,3)", "(1,2)"), ("(1,2)", "1.2"), (r"(-\infty,3)", r"(-\infty,3]"), ("x > 3", r"x \ge 3"), ("x > 3", "x < 3"),
        ("(3, \\infty)", "x < 3"), ("1 < x < 2", r"1 < x \le 2"), ("x > 3", "y > 3"), (r"(-\infty,1)\cup(2,\infty)", r"(1,2)"), (r"x<1 \text{ or } x>2", r"x>1 \text{ or } x<2"),
        (r"(1,\infty)\cup(-\infty,3)", "x > 1 and x < 3"), (r"(0,1)\cup(2,3)", r"(0,1)\cap(2,3)"), ("(1,2)", "(1;3)"), (r"\mathbb{R}", r"\mathbb{Z}"),
    ],
    "relations": [
        ("x=5", "y=5"), ("y=2x+3", "y=2x-3"), ("y = 2x+3", "y = 3x+2"), ("x^2+y^2=1", "x^2+y^2"), ("x^2+y^2=1", "x^2-y^2=1"), ("x=5", "2x=5"), ("x+y<1", "x+y>1"), ("x+y<1", r"x+y \le 1"), (r"x \ne 3", "x = 3"),
        ("x=5", r"x \approx 5.1"), ("2x+3y=12", "12"), ("f(x)=x^2", "g(x)=x^2"), ("x=5", "x^2=25"),
    ],
    "numerals, times, ratios": [
        ("52_8", "52_9"), ("1010_2", "1010_3"), ("52_8", "42"), ("10", "10_2"), ("2:30", "2:03"), (r"2:30 \text{ p.m.}", r"2:30 \text{ a.m.}"), (r"2:30 \text{ pm}", "14:30 am"), ("2:30", "1:15"), ("3:4", "4:3"), ("2:3:5", "2:5:3"),
        ("3:4", "3.4"), ("2024-01-05", "2018"), ("2024-01-05", "2024-05-01"), ("1/2/2024", r"\frac{1}{4048}"),
    ],
    "matrices and cases": [
        (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}"), (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 & 2 \end{pmatrix}"),
        (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{vmatrix} 1 & 2 \\ 3 & 4 \end{vmatrix}"), (r"\begin{vmatrix} 1 & 2 \\ 3 & 4 \end{vmatrix}", r"\begin{pmatrix} -2 \end{pmatrix}"),
        (r"\begin{cases} 1 & x>0 \\ 0 & x \le 0 \end{cases}", r"\begin{cases} 1 & x<0 \\ 0 & x \ge 0 \end{cases}"), (r"\begin{cases} x+y=1 \\ x-y=3 \end{cases}", r"\begin{cases} x+y=1 \\ x-y=2 \end{cases}"),
    ],
    "texts": [
        ("CAB", "ABC"), ("left", "felt"), ("No", "on"), ("Yes", "No"), (r"n \text{ is odd}", r"n \text{ is even}"), ("Evelyn", "Even"), ("CO", "Co"), (r"\text{no solution}", "solution"), ("undefined", "0"), ("H_2O", "H_2O_2"), ("even", "never"),
        ("increasing", "decreasing"), ("true", "false"), ("noon", "no on"), ("Evelyn", r"\text{not Evelyn}"), ("north", "thorn"), ("listen", "silent"), (r"\text{even}", r"\text{odd}"),
    ],
    "sums and integrals": [
        (r"\sum_{k=1}^{n} \frac{1}{k}", r"\sum_{k=1}^{m} \frac{1}{k}"), (r"\int_0^1 f(x) dx", r"\int_0^2 f(x) dx"), (r"\int_0^1 10^{-20} x dx", r"\int_0^1 10^{-30} x dx"), (r"\sum_{k=1}^{n} X_k", r"\sum_{k=1}^{n} x_k"),
        (r"\lim_{x \to 0} f(x)", r"\lim_{x \to 1} f(x)"),
    ],
}  # fmt: skip
